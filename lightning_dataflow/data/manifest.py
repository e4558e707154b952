"""Features that a producer put into the store once, for any number of passes."""

from collections.abc import Sequence

from lightning_dataflow.contracts import SampleRef
from lightning_dataflow.control import RunPlan
from lightning_dataflow.data.source import RefWindow
from lightning_dataflow.data.streaming import StreamingSource


class ManifestSource(StreamingSource):
    """Refs of a static manifest: a log in which seq i is sample i, and which ends.

    The features stay in the store for all passes. The producer puts lost ones there again, and frees all of them when
    training has finished.

    Args:
        store: with `retain`.
    """

    _is_complete = False

    def begin(self, plan: RunPlan, rank: int, world_size: int) -> None:
        """Ask for every sample."""
        n = len(self)
        self._is_complete, self._skipped = False, {}
        super().begin(RunPlan(start=0, stop=n, window=n), rank, world_size)

    def num_tokens(self, seq: int) -> int:
        """The first call waits for all samples."""
        self._wait_for_all()
        return self.queue.num_tokens(self.log_seq(seq))

    def window(self, seqs: range, share: Sequence[int]) -> RefWindow:
        """The first call waits for all samples."""
        self._wait_for_all()
        window = self.queue.get([self.log_seq(seq) for seq in seqs], [self.log_seq(seq) for seq in share])
        reasons = self.queue.skipped
        skipped = {seq: reasons[index] for seq in seqs if (index := self.log_seq(seq)) in reasons}
        self._skipped = {**self._skipped, **skipped}
        return window

    def skipped(self) -> dict[int, str]:
        """The seqs of all passes."""
        return dict(self._skipped)

    def log_seq(self, seq: int) -> int:
        return self.order.locate(seq)[0]

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
            self.queue.get(range(len(self)), ())
            self._is_complete = True
