"""Topology `online`: the target runs in the training process and captures what the next window needs."""

import secrets
from collections.abc import Sequence

from torch import Tensor

from lightning_dataflow.contracts import BrokenFeaturesError, SampleRef
from lightning_dataflow.control import ControlPlane, resolve_control_plane
from lightning_dataflow.data.source import IndexedSource, RefWindow
from lightning_dataflow.producers.feeds import PromptFeed
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.stores import FeatureStore, MemoryFeatureStore
from lightning_dataflow.targets import TargetEngine


class OnlineSource(IndexedSource):
    """Captures on demand, again in each pass.

    Args:
        target: with its capture layers set.
        store: where features wait for the step that uses them.
        plane: by default one that coordinates nothing.
        capture_batch_size: prompts per target forward pass. 1 gives the same bits in every topology; more is faster on a
            GPU, and rounds differently when the groups differ.

    Raises:
        UserError: the prompts hold tokens that the target does not know, or are longer than its positions.
    """

    sees_all_skips = False
    prefetch_windows = 0  # a prefetch thread would run the target while the trainer computes on the same device

    def __init__(
        self,
        prompts: PromptDataset,
        target: TargetEngine,
        store: FeatureStore | None = None,
        *,
        plane: ControlPlane | None = None,
        capture_batch_size: int = 1,
    ):
        self.prompts = prompts
        self.store = store or MemoryFeatureStore()
        self.capture_batch_size = capture_batch_size
        self.plane = plane or resolve_control_plane("local_colocated", secrets.token_hex(4))
        self._feed = PromptFeed(
            prompts, target, seed=0, run_id=self.plane.run_id, locate=lambda seq: self.order.locate(seq)
        )
        self.card = self._feed.card
        self.source_ids = prompts.source_ids
        self.lengths = prompts.lengths.tolist()

    def window(self, seqs: range, share: Sequence[int]) -> RefWindow:
        """Captures the share now. Raises NotFiniteError when the target captures nothing but NaN or infinity."""
        refs: dict[int, SampleRef | None] = {}
        broken: dict[int, str] = {}
        for start in range(0, len(share), self.capture_batch_size):
            group = share[start : start + self.capture_batch_size]
            for sample in self._feed.capture(group, 0, group):
                try:
                    refs[sample.seq] = self._feed.put(sample, self.store)
                except BrokenFeaturesError as error:
                    refs[sample.seq], broken[sample.seq] = None, str(error)
        return self.make_window(seqs, refs, broken)

    def in_flight(self) -> dict[str, int]:
        health = self.store.health()
        return {"refs_in_flight": health["num_samples"], "bytes_in_flight": health["num_bytes"]}

    def token_counts(self, vocab_size: int) -> Tensor:
        return self.prompts.token_counts(vocab_size)
