"""The LightningDataModule: windows of references in, micro-batches out."""

import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control import RunPlan
from lightning_dataflow.data.collate import Batch
from lightning_dataflow.data.prefetch import Prefetcher
from lightning_dataflow.data.reader import WindowReader
from lightning_dataflow.data.source import RefSource
from lightning_dataflow.data.windows import Batching, PassOrder

BAD_STEP = "the loss or gradient of its step was NaN or infinity"
"""The reason of samples that are skipped for this. It names no sample, so that counts by reason stay short."""


class DataFlowDataModule(L.LightningDataModule):
    """Feeds a Trainer from any topology, and resumes at the exact sample.

    Its state in a checkpoint is the cursor, which is the first seq that no applied optimizer step has used, and which
    samples before the cursor were skipped or captured again.

    Batches are dicts. Beside what the module's `collate` makes they hold: `window_num_tokens`, the tokens of the window
    over all ranks; `next_seq`, the cursor after the window's optimizer step; the `source_ids` of their samples; and
    `broken`, the error message if features hold NaN or infinity, otherwise None.

    Attributes:
        num_bad_steps: how many of the newest steps were bad, one after the other; see `count_step`.

    Args:
        source: where references come from, for example `OnlineSource` or `OfflineSource`.
        global_batch_size: samples per optimizer step, over all ranks; with packing, at most.
        micro_batch_size: rows per forward pass and rank. A row is one sample, or with packing `row_tokens` tokens.
        row_tokens: pack samples into rows of this many tokens.
        rows_per_step: with packing, rows per optimizer step, over all ranks.
        seed: of the order of samples.
        prefetch_windows: windows that a thread reads ahead; 0 reads when asked, None is what the source suggests.
        skip_ids: source ids of samples that are not trained. They keep their places with zero loss weight.
        run_id: checkpoints of another run are refused.

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self,
        source: RefSource,
        *,
        global_batch_size: int = 8,
        micro_batch_size: int = 1,
        row_tokens: int | None = None,
        rows_per_step: int | None = None,
        seed: int = 0,
        prefetch_windows: int | None = None,
        skip_ids: Collection[str] = (),
        run_id: str | None = None,
    ):
        super().__init__()
        self.source = source
        self.source.skip_ids = frozenset(skip_ids)
        self.batching = Batching(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            row_tokens=row_tokens,
            rows_per_step=rows_per_step,
        )
        self.source.order = PassOrder(len(source), seed)
        self.prefetch_windows = prefetch_windows
        self.run_id = run_id
        self.next_seq = 0
        self.wait_seconds = 0.0
        self._reader: WindowReader | None = None
        self._prefetcher: Prefetcher | None = None
        self._saved_seq: int | None = None
        self._skipped: dict[int, str] = {}  # in the fits that this one resumes, on other ranks, and in bad steps
        self.num_bad_steps = 0
        self._recaptured_before = 0
        self._closed = False

    def accumulate_grad_batches(self, world_size: int) -> int:
        """The Trainer's argument of this name. Raises UserError when the batch sizes do not divide."""
        return self.batching.accumulation(world_size)

    def train_dataloader(self) -> "_Stream":
        """A stream of micro-batches. Nothing is read before the first `next`."""
        return _Stream(self)

    def start(self, *, resumed: bool) -> None:
        """A fit begins, at the first sample or at the checkpoint's cursor. Called on every rank."""
        if not resumed:
            self.next_seq, self._skipped, self.num_bad_steps, self._recaptured_before = 0, {}, 0, 0
        self._closed = False
        self.wait_seconds = 0.0
        trainer = self.trainer
        assert trainer is not None, "a fit has a trainer"
        self.source.resumable = bool(trainer.checkpoint_callbacks)
        window = self.batching.global_batch_size
        stop = self.next_seq + (trainer.max_steps - trainer.global_step) * window
        plan = RunPlan(start=self.next_seq, stop=stop, window=window)
        self.source.check_order()
        if trainer.global_rank > 0:  # rank 0 first: it voids what an earlier fit left in the log
            trainer.strategy.barrier("the run has begun")
        self.source.begin(plan, trainer.global_rank, trainer.world_size)
        if trainer.global_rank == 0:
            trainer.strategy.barrier("the run has begun")
        if self.batching.packed and not self.source.shares_any_seqs:
            raise UserError(
                f"each of the {trainer.world_size} ranks captures its own slice of a window here, so samples cannot be "
                "packed: train on one rank, or use topology=online with control=noop, or topology=disagg_online"
            )

    def mark_applied(self, next_seq: int, global_step: int) -> None:
        """The optimizer step that used everything before `next_seq` has run."""
        self.next_seq = next_seq
        assert self._reader is not None, "a step reads batches first"
        freed = self._reader.release(next_seq) if self.source.release_at == "applied" else []
        self.source.applied(freed, next_seq, global_step)

    def count_step(self, seqs: Iterable[int], *, is_bad: bool) -> int:
        """Whether the step that used `seqs` was bad: then it changed nothing, and they count as skipped.

        Returns the number of bad steps in a row up to this one.
        """
        self.num_bad_steps = self.num_bad_steps + 1 if is_bad else 0
        if is_bad:
            self._skipped |= dict.fromkeys(seqs, BAD_STEP)
        return self.num_bad_steps

    def mark_saved(self, global_step: int) -> None:
        """The checkpoint for which `state_dict` was last called is complete. Does nothing the second time.

        A DataFlowTrainer calls this itself. For other Trainers, StreamCursor does at the next batch.
        """
        if self._saved_seq is not None:
            freed: list[int] = []
            if self._reader is not None and self.source.release_at == "durable":
                freed = self._reader.release(self._saved_seq)
            self.source.durable(self._saved_seq, global_step, freed)
            self._saved_seq = None

    def forget_saved(self) -> None:
        """The state that `state_dict` last returned is in no checkpoint to resume from."""
        self._saved_seq = None

    def skipped(self) -> dict[int, str]:
        """Seqs before the cursor that were not trained, with the reasons, since the run began.

        Of all ranks once a checkpoint was written or training has ended. What was only read ahead is not among them.
        """
        return {seq: reason for seq, reason in (self._skipped | self.source.skipped()).items() if seq < self.next_seq}

    def share_skipped(self) -> None:
        """Tell all ranks which samples each has skipped, where they do not see it in a log. A collective."""
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1 or self.source.sees_all_skips:
            return
        gathered: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(gathered, self.source.skipped())
        for skipped in gathered:
            self._skipped |= skipped

    def num_recaptured(self) -> int:
        """Samples that were captured again because their features were lost, since the run began."""
        return self._recaptured_before + len(self.source.recaptured())

    def close(self, status: str) -> None:
        """End reading and free what was captured and not trained. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        if status != "completed":
            self.source.store.stop_waiting()
        self.source.cancel()
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._reader is not None:
            self._reader.discard()
        self.source.finish(status)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.close("completed")

    def on_exception(self, exception: BaseException) -> None:
        """After an exception Lightning does not call `teardown`."""
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        self.close("interrupted" if interrupted else f"failed: {str(exception) or type(exception).__name__}")

    def state_dict(self) -> dict[str, Any]:
        """The cursor, the settings that define the order it counts in, and counts of the samples before it. Plain data."""
        if (count := getattr(getattr(self.trainer, "lightning_module", None), "count_last_step", None)) is not None:
            count()
        self._saved_seq = self.next_seq
        self.share_skipped()
        return {
            "next_seq": self.next_seq,
            "skipped": self.skipped(),
            "recaptured": self._recaptured_before + sum(seq < self.next_seq for seq in self.source.recaptured()),
            "bad_steps": self.num_bad_steps,
            "run_id": self.run_id,
            **self._identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the checkpoint's cursor. Raises UserError; see `check_state`."""
        self.check_state(state_dict)
        self.next_seq = state_dict["next_seq"]
        self._skipped, self._recaptured_before = dict(state_dict["skipped"]), state_dict["recaptured"]
        self.num_bad_steps = state_dict.get("bad_steps", 0)  # 0.1 has none

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise UserError if a checkpoint counts samples in another order, or belongs to another run."""
        for name, value in self._identity().items():
            if (saved := state_dict.get(name)) != value:
                raise UserError(
                    f"the checkpoint was written with {name}={saved}, this run has {value}: "
                    "resume with the same data, seed, global_batch_size and packing, or start a new run"
                )
        if self.run_id is not None and state_dict.get("run_id") not in (None, self.run_id):
            raise UserError(
                f"the checkpoint belongs to the run {state_dict['run_id']}, this is {self.run_id}: resume it under its own "
                "run_name, or start a new run"
            )

    def _identity(self) -> dict[str, int | str | None]:
        return {
            "prompts": self.source.card.prompts_version,
            "seed": self.source.order.seed,
            "global_batch_size": self.batching.global_batch_size,
            "row_tokens": self.batching.row_tokens,
            "rows_per_step": self.batching.rows_per_step,
        }

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this rank from the cursor to the end of the fit."""
        trainer = self.trainer
        assert trainer is not None, "a fit has a trainer"
        self._reader = WindowReader(
            source=self.source,
            collate=cast(Any, trainer.lightning_module).collate,
            batching=self.batching,
            next_seq=self.next_seq,
            num_windows=trainer.max_steps - trainer.global_step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        batches = self._prefetched(iter(self._reader), trainer)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _prefetched(self, batches: Iterator[Batch], trainer: L.Trainer) -> Iterator[Batch]:
        windows = self.source.prefetch_windows if self.prefetch_windows is None else self.prefetch_windows
        if windows == 0:
            return batches
        depth = windows * self.accumulate_grad_batches(trainer.world_size)
        self._prefetcher = Prefetcher(batches, depth=depth, device=trainer.strategy.root_device)
        return iter(self._prefetcher)


class _Stream:
    """Starts again at the cursor with each `iter`, which Lightning calls more often than it reads.

    With `state_dict` and `load_state_dict`, Lightning treats it as a loader that resumes; the DataModule holds the state.
    """

    def __init__(self, data: DataFlowDataModule):
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        return self._data.batches()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert not state_dict, "the DataModule holds the cursor"
