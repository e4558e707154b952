"""The LightningDataModule: windows of references in, micro-batches out."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import lightning as L
import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control import RunPlan
from lightning_dataflow.data.collate import Batch, Sample
from lightning_dataflow.data.prefetch import Prefetcher
from lightning_dataflow.data.reader import Collate, WindowReader
from lightning_dataflow.data.source import RefSource
from lightning_dataflow.data.windows import PassOrder, accumulation


class DataFlowDataModule(L.LightningDataModule):
    """Feeds a Trainer from any topology, and resumes at the exact sample.

    Its state in a checkpoint is the cursor: the first seq that no applied optimizer step has used. Batches are dicts of
    tensors; beside what `collate` makes they hold `window_num_tokens`, Σ tokens of the window over all ranks, and
    `next_seq`, the cursor once the window's optimizer step has run.

    Args:
        source: where references come from, for example `OnlineSource` or `OfflineSource`.
        global_batch_size: samples per optimizer step, over all ranks.
        micro_batch_size: samples per forward pass and rank.
        seed: of the order of samples.
        collate: how samples become a batch; by default the `collate` of the trainer's module.
        prefetch_windows: windows that a thread reads ahead; 0 reads when asked, None is what the source suggests.
    """

    def __init__(
        self,
        source: RefSource,
        *,
        global_batch_size: int = 8,
        micro_batch_size: int = 1,
        seed: int = 0,
        collate: Collate | None = None,
        prefetch_windows: int | None = None,
    ):
        super().__init__()
        self.source = source
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.order = PassOrder(len(source), seed)
        self.collate = collate
        self.prefetch_windows = prefetch_windows
        self.next_seq = 0
        self.first_seq = 0  # where this fit started: 0, or a checkpoint's cursor
        self.wait_seconds = 0.0
        self._reader: WindowReader | None = None
        self._prefetcher: Prefetcher | None = None
        self._saved_seq: int | None = None
        self._closed = False

    def accumulate_grad_batches(self, world_size: int) -> int:
        """What the Trainer must be given. Raises UserError when the batch sizes do not divide."""
        return accumulation(self.global_batch_size, self.micro_batch_size, world_size)

    def train_dataloader(self) -> "_Stream":
        """A stream of micro-batches; nothing happens before its first `next`."""
        return _Stream(self)

    def start(self, *, resumed: bool) -> None:
        """A fit begins: count from here, and from the first sample unless it goes on from a checkpoint. On every rank."""
        if not resumed:
            self.next_seq = 0
        self.first_seq = self.next_seq
        self.wait_seconds = 0.0
        trainer = self.trainer
        assert trainer is not None, "a fit has a trainer"
        self.source.check_order(self.order)
        self.source.resumable = bool(trainer.checkpoint_callbacks)
        plan = RunPlan(start=self.next_seq, stop=trainer.max_steps * self.global_batch_size, window=self.global_batch_size)
        if trainer.global_rank == 0:
            self.source.begin(plan, 0, trainer.world_size)
        trainer.strategy.barrier("the run has begun")  # what an earlier run left in the log no longer holds
        if trainer.global_rank > 0:
            self.source.begin(plan, trainer.global_rank, trainer.world_size)

    def mark_applied(self, next_seq: int, global_step: int) -> None:
        """The optimizer step that used everything before `next_seq` has run; see `source.release_at`."""
        self.next_seq = next_seq
        assert self._reader is not None, "a step reads batches first"
        freed = self._reader.release(next_seq) if self.source.release_at == "applied" else []
        self.source.applied(freed, next_seq, global_step)

    def mark_saved(self, global_step: int) -> None:
        """A checkpoint of `global_step` is complete; saving is synchronous, so the next batch means that it is."""
        if self._saved_seq is not None:
            keeps = self._reader is not None and self.source.release_at == "durable"
            freed = self._reader.release(self._saved_seq) if keeps and self._reader else []
            self.source.durable(self._saved_seq, global_step, freed)
            self._saved_seq = None

    def close(self, status: str) -> None:
        """End reading and free what was captured and not trained. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        self.source.cancel()
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._reader is not None:
            self._reader.discard()
        self.source.finish(status)

    def teardown(self, stage: str) -> None:
        """Lightning's hook."""
        if stage == "fit":
            self.close("completed")

    def on_exception(self, exception: BaseException) -> None:
        """Lightning's hook; `teardown` does not follow it."""
        self.close(
            "interrupted"
            if isinstance(exception, KeyboardInterrupt)
            else f"failed: {str(exception) or type(exception).__name__}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what gives it its meaning, as plain data."""
        self._saved_seq = self.next_seq
        return {"next_seq": self.next_seq, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the checkpoint's cursor. Raises UserError when it counts in another order of samples."""
        for name, value in self._identity().items():
            if state_dict[name] != value:
                raise UserError(
                    f"the checkpoint was written with {name}={state_dict[name]}, this run has {value}: "
                    "resume with the same data, seed and global_batch_size, or start a new run"
                )
        self.next_seq = state_dict["next_seq"]

    def _identity(self) -> dict[str, int | str]:
        return {
            "prompts": self.source.card.prompts_version,
            "seed": self.order.seed,
            "global_batch_size": self.global_batch_size,
        }

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this rank from the cursor to the end of the fit."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        first = self.next_seq // self.global_batch_size
        windows = range(first, trainer.max_steps) if trainer else itertools.count(first)
        reader = self._reader = WindowReader(
            self.source,
            self.order,
            self._collate,
            iter(windows),
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        self._closed = False
        batches = self._prefetched(reader, world_size)
        try:
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                self.wait_seconds += time.perf_counter() - start
                if batch is None:
                    return
                yield batch
        finally:
            if trainer is None:
                self.close("ended")

    def _prefetched(self, reader: WindowReader, world_size: int) -> Iterator[Batch]:
        windows = self.source.prefetch_windows if self.prefetch_windows is None else self.prefetch_windows
        if windows == 0:
            return iter(reader)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        depth = windows * self.accumulate_grad_batches(world_size)
        self._prefetcher = Prefetcher(iter(reader), depth=depth, device=device)
        return iter(self._prefetcher)

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        if self.collate is not None:
            return self.collate(samples)
        assert self.trainer is not None, "without a trainer, `collate` is an argument"
        return cast(Any, self.trainer.lightning_module).collate(samples)


class _Stream:
    """Lightning calls `iter` more often than it reads, so this starts over at the cursor each time.

    Lightning takes a loader with these two methods for one that resumes; the state is the DataModule's.
    """

    def __init__(self, data: DataFlowDataModule):
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        return self._data.batches()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert not state_dict, "the DataModule holds the cursor"
