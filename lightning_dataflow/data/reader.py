"""From windows of references to collated micro-batches of one rank."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lightning_dataflow.contracts import FeatureHandle, SampleRef
from lightning_dataflow.contracts.log import MAX_SEQ
from lightning_dataflow.data.collate import Batch, Sample, SampleRows
from lightning_dataflow.data.finite import broken_features
from lightning_dataflow.data.source import FeatureCard, RefSource
from lightning_dataflow.data.windows import MIN_ROW_TOKENS, Batching, share_of
from lightning_dataflow.stores.base import Tensors

Collate = Callable[[SampleRows], Batch]
MicroBatch = list[list[tuple[int, SampleRef | None]]]
"""Rows of samples: seqs and refs."""
PLACEHOLDER_TOKENS = MIN_ROW_TOKENS
SKIPPED = "skipped"
READ_BYTES = 64 << 20
"""Of the samples that are read in one round trip."""


@dataclass(kw_only=True)
class WindowReader:
    """Reads and collates windows, and holds what it read until the optimizer step that used it has run.

    A row without samples, because all of them were skipped or it is empty, becomes a few tokens without loss weight.
    Features with NaN or infinity are detected here, wherever they were captured. Raising would leave other ranks waiting,
    so the batch carries the message, and the optimizer step, where all ranks meet, changes nothing.

    Attributes:
        next_seq: where the next window starts.
        num_windows: how many windows to read.
    """

    source: RefSource
    collate: Collate
    batching: Batching
    next_seq: int
    num_windows: int
    rank: int
    world_size: int
    _held: deque[tuple[int, FeatureHandle | None]] = field(default_factory=deque, init=False)  # by seq
    _pending: deque[MicroBatch] = field(default_factory=deque, init=False)

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches, window by window."""
        for _ in range(self.num_windows):
            window = self.batching.window(self.next_seq, self.source.num_tokens)
            self.next_seq = window.seqs.stop
            rows = share_of(window.rows, self.rank, self.world_size)
            share = [seq for row in rows for seq in row]
            found = self.source.window(window.seqs, share)
            refs = dict(zip(share, found.refs, strict=True))
            laid_out = [[(seq, refs[seq]) for seq in row] for row in rows]
            size = self.batching.micro_batch_size
            self._pending.extend(laid_out[first : first + size] for first in range(0, len(laid_out), size))
            of_window = {"window_num_tokens": max(found.num_tokens, 1), "next_seq": window.seqs.stop}
            while self._pending:
                for samples in self._read():
                    yield self.collate(samples) | of_window | _of_samples(samples)

    def release(self, next_seq: int) -> list[int]:
        """Release the features of seqs below `next_seq`; returns those seqs."""
        released = []
        while self._held and self._held[0][0] < next_seq:
            released.append(self._held.popleft())
        self.source.store.release_many([handle for _, handle in released if handle is not None])
        return [seq for seq, _ in released]

    def discard(self) -> None:
        """The fit ended: free what was read and not used, and what was not read, if this rank is the one to do it."""
        if self.source.frees_at_end():
            self.release(MAX_SEQ)
            self.source.discard([ref for rows in self._pending for ref in _refs(rows)])
        self._held.clear()
        self._pending.clear()

    def _read(self) -> list[SampleRows]:
        """The next micro-batches, as many as one round trip should read."""
        micro_batches = self._next_micro_batches()
        for ref in itertools.chain.from_iterable(map(_refs, micro_batches)):
            self.source.card.check_ref(ref)
        results = iter(self.source.store.get_many([ref for rows in micro_batches for ref in _refs(rows)]))
        samples = {
            seq: self._sample(seq, ref, None if ref is None else next(results))
            for rows in micro_batches
            for row in rows
            for seq, ref in row
        }
        for _ in micro_batches:
            self._pending.popleft()
        return [self._lay_out([[samples[seq] for seq, _ in row] for row in rows]) for rows in micro_batches]

    def _next_micro_batches(self) -> list[MicroBatch]:
        """As many as READ_BYTES allows, at least one."""
        chosen: list[MicroBatch] = []
        num_bytes = 0
        for rows in self._pending:
            num_bytes += sum(ref.num_bytes for ref in _refs(rows))
            if chosen and num_bytes > READ_BYTES:
                break
            chosen.append(rows)
        return chosen

    def _lay_out(self, rows: Sequence[Sequence[Sample | None]]) -> SampleRows:
        placeholder = placeholder_sample(self.source.card)
        filled = [[sample for sample in row if sample is not None] or [placeholder] for row in rows]
        return SampleRows(filled, self.batching.row_tokens)

    def _sample(
        self, seq: int, ref: SampleRef | None, result: tuple[Tensors, FeatureHandle] | KeyError | None
    ) -> Sample | None:
        """What to train in this place; None if the sample was skipped."""
        while ref is not None and isinstance(result, KeyError):
            ref = self.source.replace(seq, ref, str(result.args[0]))
            if ref is not None:
                self.source.card.check_ref(ref)
            (result,) = self.source.store.get_many([ref]) if ref is not None else [None]
        if ref is None or not isinstance(result, tuple):
            self._held.append((seq, None))
            return None
        tensors, handle = result
        self._held.append((seq, handle))
        origin = ref.origin
        return Sample(
            sample_id=origin.sample_id,
            source_id=origin.source_id,
            pass_index=self.source.order.locate(seq)[1],
            num_tokens=origin.num_tokens,
            tensors=tensors,
            broken=broken_features(tensors, origin.source_id, origin.sample_id),
        )


def _refs(rows: MicroBatch) -> list[SampleRef]:
    return [ref for row in rows for _, ref in row if ref is not None]


def _of_samples(samples: SampleRows) -> Batch:
    """The names of a batch's samples, and what is wrong with their features, for error messages."""
    real = [sample for row in samples.rows for sample in row if sample.source_id != SKIPPED]
    return {
        "source_ids": [sample.source_id for sample in real],
        "broken": next((sample.broken for sample in real if sample.broken), None),
    }


def placeholder_sample(card: FeatureCard) -> Sample:
    """A sample of zeros without loss weight."""
    n, size, dtype = PLACEHOLDER_TOKENS, card.capture.hidden_size, getattr(torch, card.dtype)
    tensors = {
        "input_ids": torch.zeros(n, dtype=torch.int64),
        "loss_mask": torch.zeros(n, dtype=torch.uint8),
        "aux_hidden_states": torch.zeros(n, len(card.capture.layer_ids) * size, dtype=dtype),
        "last_hidden_state": torch.zeros(n, size, dtype=dtype),
    }
    kept = {name: tensors[name] for name in card.features}
    return Sample(sample_id=SKIPPED, source_id=SKIPPED, pass_index=0, num_tokens=n, tensors=kept)
