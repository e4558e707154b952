"""Refs that other processes or threads publish while training runs."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_dataflow.contracts import SampleRef, UserError
from lightning_dataflow.control import ControlPlane, Reconciliation, RunPlan, Watermarks, reconcile_on_restart
from lightning_dataflow.control.heartbeat import Heartbeat, claim_trainer
from lightning_dataflow.data.announcement import Announcement
from lightning_dataflow.data.kept import KeptSamples
from lightning_dataflow.data.queue import StreamingRefQueue
from lightning_dataflow.data.source import RefSource, RefWindow
from lightning_dataflow.stores import FeatureStore

log = logging.getLogger(__name__)


class StreamingSource(RefSource):
    """The trainer's end of the control plane.

    The constructor waits for a producer to announce the run. `begin` tells the producers which seqs this fit needs, and
    requests lost samples of a resumed run again.

    Args:
        durable_below: the watermarks of the producers, to keep features until a complete checkpoint holds the step that
            used them; a checkpoint is written early when they near the marks. By default, features are freed once that
            step has run; a resume then has the samples after its checkpoint captured again.
        start_timeout_s: how long to wait for a producer to announce the run.
        idle_timeout_s: how long to wait for a sample.
        pump: see StreamingRefQueue.

    Raises:
        PeerTimeoutError: no producer announced the run.
        UserError: the folder belongs to another run.
    """

    prefetch_windows = 2

    def __init__(
        self,
        plane: ControlPlane,
        store: FeatureStore,
        *,
        durable_below: Watermarks | None = None,
        start_timeout_s: float = 1800.0,
        idle_timeout_s: float = 600.0,
        pump: Callable[[], bool] | None = None,
    ):
        self.release_at = "applied" if durable_below is None else "durable"
        announced = Announcement.from_json(plane.log.wait_for_card(start_timeout_s, "a producer"), plane.log.name)
        if announced.run_id != plane.run_id:
            raise UserError(
                f"{plane.log.name} belongs to run {announced.run_id}, this trainer is of run {plane.run_id}: give all "
                "processes of a run the same run_name and channel.path"
            )
        self.card = announced.card
        self._announced = announced
        self._durable_below = durable_below
        self._kept: KeptSamples | None = None
        self.store = store
        self.plane = plane
        self.reconciliation: Reconciliation | None = None
        self._rank: int | None = None  # None until `begin`: only a trainer that began the run may end it
        self._idle_timeout_s = idle_timeout_s
        self._pump = pump
        self._heartbeat: Heartbeat | None = None
        self.queue = self._make_queue(0)

    def __len__(self) -> int:
        return self._announced.num_samples

    def check_order(self) -> None:
        if self._announced.seed not in (None, self.order.seed):
            raise UserError(
                f"the producers of {self.plane.log.name} count samples in the order of seed {self._announced.seed}, this "
                f"trainer has seed {self.order.seed}: use one seed for all processes of a run"
            )

    def begin(self, plan: RunPlan, rank: int, world_size: int) -> None:
        """Rank 0 rebuilds the ledger from what the log and the store hold."""
        if rank == 0:
            claim_trainer(self.plane.ledger, self.plane.run_id)
        else:
            self.plane.ledger.join()
        self._rank = rank
        self._applied_seq = self._durable_seq = plan.start
        if self._durable_below is not None:
            self._kept = KeptSamples(
                self._durable_below,
                window=plan.window,
                group=self._announced.capture_batch_size,
                largest_bytes=self._announced.largest_bytes,
            )
        self.plane.log.rewind()
        self.queue = self._make_queue(plan.start)
        self._heartbeat = Heartbeat(self.plane.ledger, f"trainer-{rank}", self._describe)
        if rank == 0:
            self.reconciliation = reconcile_on_restart(self.plane, self.store, plan, self.queue.catch_up)
            num_live, num_lost = self.reconciliation.num_live, len(self.reconciliation.lost)
            if num_live or num_lost:
                log.info(f"{num_live} samples of an earlier fit are in the store, {num_lost} are captured again")
            self.queue.forget(self.reconciliation.lost)
        else:
            self.queue.catch_up()
        self.queue.take_unwanted()  # those of earlier fits are swept

    def num_tokens(self, seq: int) -> int:
        return self.queue.num_tokens(seq)

    def window(self, seqs: range, share: Sequence[int]) -> RefWindow:
        """Raises PeerTimeoutError, PeerFailedError or UserError; see StreamingRefQueue."""
        return self.queue.get(seqs, share)

    def replace(self, seq: int, ref: SampleRef, reason: str) -> SampleRef | None:
        return self.queue.fail(self.log_seq(seq), ref, reason)

    def log_seq(self, seq: int) -> int:
        """The number of the sample in the log, which is not `seq` in all topologies."""
        return seq

    def token_counts(self, vocab_size: int) -> Tensor:
        announced = self._announced.token_counts
        if max(announced, default=0) >= vocab_size:
            raise UserError(
                f"the producers announced token id {max(announced)}, the target's vocabulary has {vocab_size}: "
                "give producers and trainers one target"
            )
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        counts[list(announced)] = torch.tensor(list(announced.values()), dtype=torch.int64)
        return counts

    def applied(self, seqs: Sequence[int], next_seq: int, global_step: int) -> None:
        window, self._applied_seq = range(self._applied_seq, next_seq), next_seq
        if self._kept is not None:
            self._kept.add(next_seq, len(window), self.queue.num_bytes(window))
        unwanted = self.queue.ack(next_seq)
        if self._rank == 0:
            self.plane.ledger.ack(next_seq, global_step, seqs)
            self.free([record.ref for record in unwanted if record.ref is not None])
            if not self.resumable:  # a resume would read what comes after its checkpoint
                self.plane.log.trim(next_seq)
        elif seqs:
            self.plane.ledger.free(seqs)

    def must_save(self) -> bool:
        return self._kept is not None and self._kept.must_save()

    def durable(self, next_seq: int, global_step: int, freed: Sequence[int] = ()) -> None:
        if self._kept is not None:
            self._kept.durable(next_seq)
        if freed:
            self.plane.ledger.free(freed)
        if self._rank == 0:
            self.plane.ledger.ack_durable(next_seq, global_step)
            self.plane.log.trim(self._durable_seq)  # the checkpoint before this one stays usable
            self._durable_seq = next_seq

    def frees_at_end(self) -> bool:
        return self._rank == 0 and self.plane.ledger.is_ours()

    def cancel(self) -> None:
        self.queue.cancel()

    def finish(self, status: str) -> None:
        """Rank 0 ends the run for the producers and frees what nobody read, unless another process took the run over."""
        if self.frees_at_end():
            self.plane.ledger.finish(status)
            self.queue.catch_up()
            self.free(self.queue.unread())
            self.store.clear()
        if self._heartbeat is not None:
            self._heartbeat.stop(status)
            self._heartbeat = None

    def skipped(self) -> dict[int, str]:
        return dict(self.queue.skipped)  # which the prefetch thread changes

    def recaptured(self) -> Sequence[int]:
        return self.queue.recaptured

    def _make_queue(self, start: int) -> StreamingRefQueue:
        return StreamingRefQueue(
            self.plane,
            start=start,
            skip_ids=self.skip_ids,
            idle_timeout_s=self._idle_timeout_s,
            pump=self._pump,
        )

    def _describe(self) -> str:
        waiting_for = self.queue.waiting_for
        return f"waiting for {waiting_for}" if waiting_for else "training"
