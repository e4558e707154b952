"""Features that a producer put into the store once, for any number of passes."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lightning_dataflow.contracts import SampleRef
from lightning_dataflow.control import RunPlan
from lightning_dataflow.data.source import RefWindow, WindowEntry
from lightning_dataflow.data.streaming import StreamingSource
from lightning_dataflow.data.windows import PassOrder


class ManifestSource(StreamingSource):
    """Refs of a static manifest: a log in which seq i is sample i, and which ends.

    The features stay in the store for all passes. The producer puts lost ones there again, and frees all of them when
    training has finished.

    Args:
        store: with `retain`.
    """

    _order: PassOrder
    _is_complete = False
    _skipped_so_far: Mapping[int, str] = MappingProxyType({})

    def begin(self, plan: RunPlan, rank: int, world_size: int) -> None:
        """Ask for every sample."""
        n = len(self)
        self._is_complete, self._skipped_so_far = False, {}
        super().begin(RunPlan(start=0, stop=n, window=n), rank, world_size)

    def num_tokens(self, seq: int, order: PassOrder) -> int:
        """The first call waits for all samples."""
        self._wait_for_all()
        return self.queue.num_tokens(order.locate(seq)[0])

    def window(self, seqs: range, share: Sequence[int], order: PassOrder) -> RefWindow:
        """The first call waits for all samples."""
        self._order = order
        self._wait_for_all()
        entries = self.queue.entries([self.log_seq(seq) for seq in seqs])
        reasons = self.queue.skipped
        skipped = {seq: reasons[entry.seq] for seq, entry in zip(seqs, entries, strict=True) if entry.ref is None}
        self._skipped_so_far = {**self._skipped_so_far, **skipped}
        return RefWindow(
            entries=[WindowEntry(seq=seq, ref=entries[seq - seqs.start].ref) for seq in share],
            num_tokens=sum(entry.ref.num_tokens if entry.ref else self.queue.num_tokens(entry.seq) for entry in entries),
        )

    def skipped(self) -> dict[int, str]:
        """The seqs of all passes."""
        return dict(self._skipped_so_far)

    def log_seq(self, seq: int) -> int:
        return self._order.locate(seq)[0]

    def discard(self, refs: Sequence[SampleRef]) -> None:
        """Keep them for the next pass."""

    def applied(self, seqs: Sequence[int], next_seq: int, global_step: int) -> None:
        """Free nothing."""
        if self._rank == 0:
            self.plane.ledger.ack(min(next_seq, len(self)), global_step)

    def durable(self, next_seq: int, global_step: int, freed: Sequence[int] = ()) -> None:
        """Free nothing."""
        if self._rank == 0:
            self.plane.ledger.ack_durable(min(next_seq, len(self)), global_step)

    def _wait_for_all(self) -> None:
        if not self._is_complete:
            self.queue.get(range(len(self)), range(0))
            self._is_complete = True
