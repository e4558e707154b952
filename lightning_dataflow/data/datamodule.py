"""The LightningDataModule: windows of references in, micro-batches out."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import lightning as L

from lightning_dataflow.contracts import SampleRef, UserError
from lightning_dataflow.data.collate import Batch, Sample
from lightning_dataflow.data.source import RefSource
from lightning_dataflow.data.windows import PassOrder, accumulation, rank_slice

Collate = Callable[[Sequence[Sample]], Batch]


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
        collate: how samples become a batch; by default what the trainer's module asks for.
    """

    def __init__(
        self,
        source: RefSource,
        *,
        global_batch_size: int = 8,
        micro_batch_size: int = 1,
        seed: int = 0,
        collate: Collate | None = None,
    ):
        super().__init__()
        self.source = source
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.order = PassOrder(len(source), seed)
        self.collate = collate
        self.next_seq = 0
        self.first_seq = 0  # where this fit started: 0, or a checkpoint's cursor
        self.wait_seconds = 0.0

    def accumulate_grad_batches(self, world_size: int) -> int:
        """What the Trainer must be given. Raises UserError when the batch sizes do not divide."""
        return accumulation(self.global_batch_size, self.micro_batch_size, world_size)

    def train_dataloader(self) -> "_Stream":
        """An endless stream of micro-batches; nothing happens before its first `next`."""
        return _Stream(self)

    def start(self, *, resumed: bool) -> None:
        """A fit begins: count from here, and from the first sample unless it goes on from a checkpoint."""
        if not resumed:
            self.next_seq = 0
        self.first_seq = self.next_seq
        self.wait_seconds = 0.0

    def mark_applied(self, next_seq: int) -> None:
        """The optimizer step that used everything before `next_seq` has run."""
        self.next_seq = next_seq

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what gives it its meaning, as plain data."""
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
        """Micro-batches of this rank from the cursor on, without end."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        window = self.next_seq // self.global_batch_size
        while True:
            yield from self._window(window, rank, world_size)
            window += 1

    def _window(self, window: int, rank: int, world_size: int) -> Iterator[Batch]:
        start = time.perf_counter()
        seqs = rank_slice(window, self.global_batch_size, rank, world_size)
        pending = self.source.refs([self.order.locate(seq) for seq in seqs])
        everything = rank_slice(window, self.global_batch_size, 0, 1)
        common = {
            "window_num_tokens": sum(self.source.num_tokens(self.order.locate(seq)[0]) for seq in everything),
            "next_seq": everything.stop,
        }
        try:
            while pending:
                refs, pending = pending[: self.micro_batch_size], pending[self.micro_batch_size :]
                batch = self._collate(self._read(refs)) | common
                self.wait_seconds += time.perf_counter() - start
                yield batch
                start = time.perf_counter()
        finally:  # the run ended inside the window
            self.source.discard(pending)

    def _read(self, refs: Sequence[SampleRef]) -> list[Sample]:
        samples = []
        for ref in refs:
            try:
                tensors, handle = self.source.store.get(ref)
            except KeyError as error:
                raise UserError(f"a sample is lost: {error.args[0]}; capture again") from error
            samples.append(Sample(ref=ref, tensors=tensors))
            self.source.store.release(handle)
        return samples

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        if self.collate is None:
            assert self.trainer is not None, "without a trainer, `collate` is an argument"
            self.collate = cast(Any, self.trainer.lightning_module).spec.collate
        return cast(Collate, self.collate)(samples)


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
