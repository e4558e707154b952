"""From windows of references to collated micro-batches of one rank."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from lightning_dataflow.contracts import FeatureHandle
from lightning_dataflow.data.collate import Batch, Sample, SampleRows
from lightning_dataflow.data.finite import broken_features
from lightning_dataflow.data.source import FeatureCard, RefSource, WindowEntry
from lightning_dataflow.data.windows import MIN_ROW_TOKENS, Batching, PassOrder, share_of
from lightning_dataflow.stores.base import Tensors

Collate = Callable[[SampleRows], Batch]
STAND_IN_TOKENS = MIN_ROW_TOKENS
SKIPPED = "skipped"
READ_BYTES = 64 << 20
"""Samples that are read in one round trip."""

Rows = list[list[WindowEntry]]


class _Held(NamedTuple):
    seq: int
    handle: FeatureHandle | None


class WindowReader:
    """Reads and collates windows, and holds what it read until the optimizer step that used it has run.

    A row whose samples were all skipped, or that is empty, is a few tokens without loss weight. Features with NaN or
    infinity are found here, wherever they were captured. Raising would leave other ranks waiting, so the batch carries the
    message, and the optimizer step, where all ranks meet, ends the run.

    Args:
        start: the first seq.
        num_windows: how many windows to read.
    """

    def __init__(
        self,
        source: RefSource,
        order: PassOrder,
        collate: Collate,
        batching: Batching,
        *,
        start: int,
        num_windows: int,
        rank: int,
        world_size: int,
    ):
        self._source = source
        self._order = order
        self._collate = collate
        self._batching = batching
        self._next_seq = start
        self._num_windows = num_windows
        self._rank = rank
        self._world_size = world_size
        self._held: deque[_Held] = deque()
        self._pending: deque[Rows] = deque()  # micro-batches

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches, window by window."""
        for _ in range(self._num_windows):
            window = self._batching.window(self._next_seq, lambda seq: self._source.num_tokens(seq, self._order))
            self._next_seq = window.seqs.stop
            rows = share_of(window.rows, self._rank, self._world_size)
            found = self._source.window(window.seqs, [seq for row in rows for seq in row], self._order)
            common = {"window_num_tokens": max(found.num_tokens, 1), "next_seq": window.seqs.stop}
            entries = iter(found.entries)
            laid_out = [[next(entries) for _ in row] for row in rows]
            size = self._batching.micro_batch_size
            self._pending.extend(laid_out[first : first + size] for first in range(0, len(laid_out), size))
            while self._pending:
                micro_batches = self._next_micro_batches()
                read = self._read(micro_batches)
                for _ in micro_batches:
                    self._pending.popleft()
                for samples in read:
                    yield self._collate(samples) | common | _described(samples)

    def release(self, next_seq: int) -> list[int]:
        """Give up what seqs below `next_seq` hold; returns those seqs."""
        released = []
        while self._held and self._held[0].seq < next_seq:
            released.append(self._held.popleft())
        self._source.store.release_many([one.handle for one in released if one.handle is not None])
        return [one.seq for one in released]

    def discard(self) -> None:
        """The fit ended: free what was read and not used, and what was not read, if that is for this rank to do."""
        if not self._source.frees_at_end():
            self._held.clear()
            self._pending.clear()
            return
        self.release(1 << 62)
        entries = [entry for rows in self._pending for row in rows for entry in row]
        self._source.discard([entry.ref for entry in entries if entry.ref is not None])
        self._pending.clear()

    def _next_micro_batches(self) -> list[Rows]:
        """As many as one read should hold; at least one."""
        chosen: list[Rows] = []
        num_bytes = 0
        for rows in self._pending:
            num_bytes += sum(entry.ref.num_bytes for row in rows for entry in row if entry.ref is not None)
            if chosen and num_bytes > READ_BYTES:
                break
            chosen.append(rows)
        return chosen

    def _read(self, micro_batches: Sequence[Rows]) -> list[SampleRows]:
        entries = [entry for rows in micro_batches for row in rows for entry in row]
        refs = [entry.ref for entry in entries if entry.ref is not None]
        found = iter(self._source.store.get_many(refs))
        samples = iter([self._sample(entry, None if entry.ref is None else next(found)) for entry in entries])
        return [self._lay_out([[next(samples) for _ in row] for row in rows]) for rows in micro_batches]

    def _lay_out(self, rows: Sequence[Sequence[Sample | None]]) -> SampleRows:
        card = self._source.card
        filled = [[sample for sample in row if sample is not None] or [stand_in(card)] for row in rows]
        return SampleRows(filled, self._batching.row_tokens)

    def _sample(self, entry: WindowEntry, found: tuple[Tensors, FeatureHandle] | KeyError | None) -> Sample | None:
        """What to train at this place; None where the sample was skipped."""
        while (ref := entry.ref) is not None:
            if isinstance(found, tuple):
                tensors, handle = found
                self._held.append(_Held(entry.seq, handle))
                return Sample(
                    sample_id=ref.sample_id,
                    source_id=ref.origin.source_id,
                    pass_index=self._order.locate(entry.seq)[1],
                    num_tokens=ref.num_tokens,
                    tensors=tensors,
                    broken=broken_features(tensors, ref.origin.source_id, ref.sample_id),
                )
            entry = self._source.replace(entry, str(found.args[0]) if found else "it was never read")
            if entry.ref is not None:
                (found,) = self._source.store.get_many([entry.ref])
        self._held.append(_Held(entry.seq, None))
        return None


def _described(samples: SampleRows) -> Batch:
    """The batch's sample names, and what is wrong with its features, for error messages."""
    real = [sample for row in samples.rows for sample in row if sample.source_id != SKIPPED]
    return {
        "source_ids": [sample.source_id for sample in real],
        "broken": next((sample.broken for sample in real if sample.broken), None),
    }


def stand_in(card: FeatureCard) -> Sample:
    """A sample of zeros that no loss covers."""
    n, size, dtype = STAND_IN_TOKENS, card.capture.hidden_size, getattr(torch, card.dtype)
    tensors = {
        "input_ids": torch.zeros(n, dtype=torch.int64),
        "loss_mask": torch.zeros(n, dtype=torch.uint8),
        "aux_hidden_states": torch.zeros(n, len(card.capture.layer_ids) * size, dtype=dtype),
        "last_hidden_state": torch.zeros(n, size, dtype=dtype),
    }
    kept = {name: tensors[name] for name in card.features}
    return Sample(sample_id=SKIPPED, source_id=SKIPPED, pass_index=0, num_tokens=n, tensors=kept)
