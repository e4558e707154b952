"""Features that a producer put into the store once, for any number of passes."""

from collections.abc import Sequence

from lightning_dataflow.contracts import SampleRef
from lightning_dataflow.control import RunPlan
from lightning_dataflow.data.source import RefWindow, WindowEntry
from lightning_dataflow.data.streaming import StreamingSource
from lightning_dataflow.data.windows import PassOrder


class ManifestSource(StreamingSource):
    """Refs of a static manifest: a log in which seq i is sample i, and which ends.

    The features stay in the store for all passes; the producer that put them there frees them when training has finished.
    One that is gone is put there again by the producer.

    Args:
        store: with `retain`.
    """

    _order: PassOrder
    _complete = False

    def begin(self, plan: RunPlan, rank: int, world_size: int) -> None:
        """See RefSource; asks for every sample."""
        n = len(self)
        self._complete = False
        super().begin(RunPlan(start=0, stop=n, window=n), rank, world_size)

    def num_tokens(self, seq: int, order: PassOrder) -> int:
        """See RefSource; the first call waits until all samples are there."""
        self._wait_for_all()
        return self.queue.num_tokens(order.locate(seq)[0])

    def window(self, seqs: range, share: Sequence[int], order: PassOrder) -> RefWindow:
        """See RefSource; the first call waits until all samples are there."""
        self._order = order
        self._wait_for_all()
        refs = [entry.ref for entry in self.queue.entries([order.locate(seq)[0] for seq in seqs])]
        return RefWindow(
            entries=[WindowEntry(seq=seq, ref=refs[seq - seqs.start]) for seq in share],
            num_tokens=sum(ref.num_tokens for ref in refs if ref is not None),
        )

    def replace(self, entry: WindowEntry, reason: str) -> WindowEntry:
        """See RefSource."""
        index, _ = self._order.locate(entry.seq)
        replaced = super().replace(WindowEntry(seq=index, ref=entry.ref), reason)
        return WindowEntry(seq=entry.seq, ref=replaced.ref)

    def discard(self, refs: Sequence[SampleRef]) -> None:
        """See RefSource; they stay for the next pass."""

    def applied(self, seqs: Sequence[int], next_seq: int, global_step: int) -> None:
        """See RefSource; nothing is freed."""
        if self._rank == 0:
            self.plane.ledger.ack(min(next_seq, len(self)), global_step)

    def durable(self, next_seq: int, global_step: int, freed: Sequence[int] = ()) -> None:
        """See RefSource; the manifest stays as it is."""
        if self._rank == 0:
            self.plane.ledger.ack_durable(min(next_seq, len(self)), global_step)

    def _wait_for_all(self) -> None:
        if not self._complete:
            self.queue.get(range(len(self)), range(0))
            self._complete = True
