"""Captures the features of all prompts to disk, for the `capture` command."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_dataflow.contracts import NotFiniteError, SampleRef, UserError
from lightning_dataflow.data.finite import broken_features
from lightning_dataflow.data.offline import is_captured, write_manifest
from lightning_dataflow.producers.capture import capture_prompts
from lightning_dataflow.producers.feeds import PromptFeed
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.stores import SharedDirFeatureStore
from lightning_dataflow.targets import TargetEngine

RUN_ID = "offline"


def capture_to_folder(
    prompts: PromptDataset,
    target: TargetEngine,
    folder: str | Path,
    *,
    order: Sequence[int] | None = None,
    capture_batch_size: int = 1,
    capacity_bytes: int | None = None,
    secret: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Capture every prompt into `folder` and describe it in a manifest. Returns the bytes written.

    An interrupted capture leaves no manifest. Running it again replaces its files.

    Args:
        order: prompts are captured in this order, in groups of `capture_batch_size`; file order by default.
        progress: called with (samples done, samples in all).

    Raises:
        UserError: the folder cannot be written, or holds a finished capture; or the prompts do not fit the target.
        NotFiniteError: the target captures NaN or infinity.
        CapacityError: the disk is full, or `capacity_bytes` is reached.
    """
    if is_captured(folder):
        raise UserError(f"{folder} already holds a finished capture: choose another store.root, or remove the folder")
    feed = PromptFeed(prompts, target, seed=0, run_id=RUN_ID, locate=lambda index: (index, 0))
    store = SharedDirFeatureStore(folder, retain=True, capacity_bytes=capacity_bytes, secret=secret)
    order = range(len(prompts)) if order is None else order
    refs: dict[int, SampleRef] = {}
    for start in range(0, len(order), capture_batch_size):
        group = order[start : start + capture_batch_size]
        captured = capture_prompts(feed.tasks(group, 0), target, feed.card)
        for origin, tensors in captured:
            if broken := broken_features(tensors, origin.source_id, origin.sample_id):
                raise NotFiniteError(broken)
        refs |= {index: store.put(tensors, origin) for index, (origin, tensors) in zip(group, captured, strict=True)}
        progress(len(refs), len(order))
    in_order = [refs[index] for index in range(len(prompts))]
    write_manifest(Path(folder), in_order, feed.card, feed.token_counts())
    return sum(ref.num_bytes for ref in in_order)
