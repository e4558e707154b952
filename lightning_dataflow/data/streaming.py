"""Refs that other processes or threads publish while training runs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_dataflow.contracts import SampleRef, UserError
from lightning_dataflow.control import ControlPlane, Reconciliation, RunPlan, Watermarks, reconcile_on_restart
from lightning_dataflow.control.heartbeat import Heartbeat, claim_trainer
from lightning_dataflow.data.kept import KeptSamples
from lightning_dataflow.data.offline import card_from_json
from lightning_dataflow.data.queue import StreamingRefQueue
from lightning_dataflow.data.source import FeatureCard, RefSource, RefWindow, ReleaseAt, WindowEntry
from lightning_dataflow.data.windows import PassOrder
from lightning_dataflow.stores import FeatureStore


class StreamingSource(RefSource):
    """The trainer's end of the control plane.

    Its constructor waits for a producer to announce the run; `begin` tells producers which seqs this fit needs, and
    has what a resumed one lost captured again.

    Args:
        skip_ids: see StreamingRefQueue.
        release_at: `applied` frees features once the optimizer step that used them has run; a resume has what was trained
            after its checkpoint captured again. `durable` keeps them until a complete checkpoint holds that step, and has
            one written early when they near the watermarks.
        watermarks: those of the producers; `durable` needs them.
        start_timeout_s: wait this long for a producer to announce the run.
        idle_timeout_s: wait this long for a sample.

    Raises:
        PeerTimeoutError: no producer announced the run.
        UserError: `durable` without watermarks; or the folder belongs to another run.
    """

    prefetch_windows = 2

    def __init__(
        self,
        plane: ControlPlane,
        store: FeatureStore,
        *,
        skip_ids: Collection[str] = (),
        release_at: ReleaseAt = "applied",
        watermarks: Watermarks | None = None,
        start_timeout_s: float = 1800.0,
        idle_timeout_s: float = 600.0,
        pump: Callable[[], bool] | None = None,
    ):
        if release_at not in get_args(ReleaseAt):
            raise UserError(f"release_at={release_at} is unknown: use {' or '.join(get_args(ReleaseAt))}")
        if release_at == "durable" and watermarks is None:
            raise UserError(
                "release_at=durable keeps trained features in the store: give the watermarks of the producers, or use "
                "release_at=applied"
            )
        self.release_at = release_at
        announced = plane.log.wait_for_card(start_timeout_s, "a producer")
        if announced["run_id"] != plane.run_id:
            raise UserError(
                f"{plane.log.name} belongs to run {announced['run_id']}, this trainer is of run {plane.run_id}: give all "
                "processes of a run the same run_name and channel.path"
            )
        self.card, self._num_samples, self._seed, self._token_counts = announcement_from_json(announced, plane.log.name)
        self._group, self._largest_bytes = int(announced["capture_batch_size"]), int(announced["largest_bytes"])
        self._watermarks = watermarks
        self._kept: KeptSamples | None = None
        self._window_sizes: dict[int, tuple[int, int]] = {}  # next seq → refs and bytes
        self._durable_seq = 0
        self.store = store
        self.plane = plane
        self.reconciliation: Reconciliation | None = None
        self._rank: int | None = None  # until `begin`: a run that this trainer never began is not its to end
        self._skip_ids = skip_ids
        self._idle_timeout_s = idle_timeout_s
        self._pump = pump
        self._heartbeat: Heartbeat | None = None
        self.queue = self._make_queue(0)

    def __len__(self) -> int:
        return self._num_samples

    def check_order(self, order: PassOrder) -> None:
        """See RefSource."""
        if self._seed is not None and order.seed != self._seed:
            raise UserError(
                f"the producers of {self.plane.log.name} count samples in the order of seed {self._seed}, this trainer has "
                f"seed {order.seed}: use one seed for all processes of a run"
            )

    def begin(self, plan: RunPlan, rank: int, world_size: int) -> None:
        """See RefSource. Rank 0 rebuilds the ledger from what the log and the store hold."""
        if rank == 0:
            claim_trainer(self.plane.ledger, self.plane.run_id)
        else:
            self.plane.ledger.join()
        self._rank = rank
        self._durable_seq = plan.start
        self._window_sizes.clear()
        if self.release_at == "durable" and self._watermarks is not None:
            self._kept = KeptSamples(
                self._watermarks, window=plan.window, group=self._group, largest_bytes=self._largest_bytes
            )
        self.plane.log.rewind()
        self.queue = self._make_queue(plan.start, frees=rank == 0)
        self._heartbeat = Heartbeat(self.plane.ledger, f"trainer-{rank}", self._describe)
        if rank == 0:
            self.reconciliation = reconcile_on_restart(self.plane, self.store, plan, self.queue.catch_up)
            self.queue.forget(self.reconciliation.lost)
        else:
            self.queue.skim()
        self.queue.take_unwanted()  # from before: swept

    def num_tokens(self, seq: int, order: PassOrder) -> int:
        """See RefSource. Raises PeerTimeoutError, PeerFailedError; see StreamingRefQueue."""
        return self.queue.num_tokens(seq)

    def window(self, seqs: range, share: Sequence[int], order: PassOrder) -> RefWindow:
        """See RefSource. Raises PeerTimeoutError, PeerFailedError; see StreamingRefQueue."""
        found = self.queue.get(seqs, share)
        if self._kept is not None:
            self._window_sizes[seqs.stop] = len(seqs), self.queue.num_bytes(seqs)
        return found

    def replace(self, entry: WindowEntry, reason: str) -> WindowEntry:
        """See RefSource."""
        return self.queue.fail(entry, reason)

    def token_counts(self, vocab_size: int) -> Tensor:
        """See RefSource."""
        if max(self._token_counts, default=0) >= vocab_size:
            raise UserError(
                f"the producers announced token id {max(self._token_counts)}, the target's vocabulary has {vocab_size}: "
                "give producers and trainers one target"
            )
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        counts[list(self._token_counts)] = torch.tensor(list(self._token_counts.values()), dtype=torch.int64)
        return counts

    def in_flight(self) -> dict[str, int]:
        """See RefSource."""
        num_refs, num_bytes = self.plane.ledger.in_flight()
        return {"refs_in_flight": num_refs, "bytes_in_flight": num_bytes}

    def applied(self, seqs: Sequence[int], next_seq: int, global_step: int) -> None:
        """See RefSource."""
        unwanted = self.queue.ack(next_seq)
        if self._kept is not None:
            self._kept.add(next_seq, *self._window_sizes.pop(next_seq))
        if self._rank == 0:
            self.plane.ledger.ack(next_seq, global_step, seqs)
            self._free(unwanted)
            if not self.resumable:  # else a resume may read what comes after its checkpoint
                self.plane.log.trim(next_seq)
        elif seqs:
            self.plane.ledger.free(seqs)

    def must_save(self) -> bool:
        """See RefSource."""
        return self._kept is not None and self._kept.must_save()

    def durable(self, next_seq: int, global_step: int, freed: Sequence[int] = ()) -> None:
        """See RefSource."""
        if self._kept is not None:
            self._kept.durable(next_seq)
        if freed:
            self.plane.ledger.free(freed)
        if self._rank == 0:
            self.plane.ledger.ack_durable(next_seq, global_step)
            self.plane.log.trim(self._durable_seq)  # the checkpoint before this one stays usable
            self._durable_seq = next_seq

    def frees_at_end(self) -> bool:
        """See RefSource."""
        return self._rank == 0 and self.plane.ledger.is_ours()

    def cancel(self) -> None:
        """See RefSource."""
        self.queue.cancel()

    def finish(self, status: str) -> None:
        """See RefSource. Rank 0 ends the run for the producers, and frees what nobody read, unless another took it over."""
        if self._rank == 0 and self.plane.ledger.is_ours():
            self.plane.ledger.finish(status)
            self.queue.catch_up()
            self._free(self.queue.unread())
            self.store.clear()
        if self._heartbeat is not None:
            self._heartbeat.stop(status)
            self._heartbeat = None

    def skipped(self) -> Mapping[int, str]:
        """See RefSource."""
        return self.queue.skipped

    def num_recaptured(self, below: int | None = None) -> int:
        """See RefSource."""
        return self.queue.num_recaptured if below is None else self.queue.num_recaptured_before(below)

    def _free(self, refs: Sequence[SampleRef]) -> None:
        for ref in refs:
            self.store.free(ref)

    def _make_queue(self, start: int, *, frees: bool = True) -> StreamingRefQueue:
        return StreamingRefQueue(
            self.plane,
            start=start,
            skip_ids=self._skip_ids,
            idle_timeout_s=self._idle_timeout_s,
            pump=self._pump,
            frees=frees,
        )

    def _describe(self) -> str:
        waiting_for = self.queue.waiting_for
        return f"waiting for {waiting_for}" if waiting_for else "training"


def announcement_to_json(
    card: FeatureCard, *, run_id: str, num_samples: int, seed: int | None, token_counts: Tensor
) -> dict[str, Any]:
    """What a producer announces: plain data that tells a trainer all it must know of the prompts.

    Args:
        seed: of the order of seqs; None when seqs number the samples themselves.
        token_counts: int64 [vocab_size].
    """
    supervised = token_counts.nonzero().flatten().tolist()
    return {
        "run_id": run_id,
        "card": asdict(card),
        "num_samples": num_samples,
        "seed": seed,
        "token_counts": {str(token): int(token_counts[token]) for token in supervised},
    }


def announcement_from_json(data: dict[str, Any], where: str) -> tuple[FeatureCard, int, int | None, dict[int, int]]:
    """(card, number of samples, seed, token counts). Raises UserError for something else."""
    try:
        counts = {int(token): int(count) for token, count in data["token_counts"].items()}
        num_samples, seed = int(data["num_samples"]), data["seed"]
        card = card_from_json(data["card"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"what {where} announces is damaged ({error!r}): start again under another run_name") from error
    if num_samples < 1 or min((*counts, *counts.values()), default=0) < 0:
        raise UserError(f"what {where} announces is damaged ({num_samples} samples): start again under another run_name")
    return card, num_samples, seed, counts
