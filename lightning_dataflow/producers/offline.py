"""Captures the features of all prompts to disk, for the `capture` command."""

from collections.abc import Callable
from pathlib import Path

from lightning_dataflow.contracts import BrokenFeaturesError, SampleRef, UserError
from lightning_dataflow.data.offline import is_captured, write_manifest
from lightning_dataflow.producers.capture import capture_prompts
from lightning_dataflow.producers.feeds import PromptFeed, to_put
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.stores import SharedDirFeatureStore
from lightning_dataflow.stores.base import new_ref
from lightning_dataflow.targets import TargetEngine

RUN_ID = "offline"


def capture_to_folder(
    prompts: PromptDataset,
    target: TargetEngine,
    folder: str | Path,
    *,
    seed: int = 0,
    capture_batch_size: int = 1,
    capacity_bytes: int | None = None,
    secret: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Capture every prompt into `folder` and describe it in a manifest. Returns the bytes written.

    An interrupted capture leaves no manifest. Running it again replaces its files. A sample whose features hold NaN or
    infinity gets no file; the manifest says where they do.

    Args:
        seed: of the order of seqs, in which groups of `capture_batch_size` prompts are captured.
        progress: called with (samples done, samples in all).

    Raises:
        UserError: the folder cannot be written, or holds a finished capture; or the prompts do not fit the target.
        NotFiniteError: the target captures nothing but NaN or infinity.
        CapacityError: the disk is full, or `capacity_bytes` is reached.
    """
    if is_captured(folder):
        raise UserError(f"{folder} already holds a finished capture: choose another store.root, or remove the folder")
    feed, seqs = PromptFeed(prompts, target, seed=seed, run_id=RUN_ID), range(len(prompts))
    store = SharedDirFeatureStore(folder, retain=True, capacity_bytes=capacity_bytes, secret=secret)
    refs: dict[int, SampleRef] = {}
    broken: dict[int, str] = {}
    for start in range(0, len(seqs), capture_batch_size):
        group = seqs[start : start + capture_batch_size]
        captured = capture_prompts(feed.tasks(group, 0), target, feed.card)
        for seq, (origin, tensors) in zip(group, captured, strict=True):
            index = feed.locate(seq)[0]
            try:
                refs[index] = feed.put(to_put(seq, origin, tensors), store)
            except BrokenFeaturesError as error:
                refs[index], broken[index] = new_ref(tensors, origin, store.uri), str(error.__cause__)
        progress(len(refs), len(seqs))
    in_order = [refs[index] for index in seqs]
    write_manifest(Path(folder), in_order, feed.card, feed.token_counts(), broken)
    return sum(ref.num_bytes for index, ref in refs.items() if index not in broken)
