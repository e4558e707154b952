"""From windows of references to collated micro-batches of one rank."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from lightning_dataflow.contracts import FeatureHandle
from lightning_dataflow.data.collate import Batch, Sample
from lightning_dataflow.data.source import FeatureCard, RefSource, WindowEntry
from lightning_dataflow.data.windows import PassOrder, rank_slice
from lightning_dataflow.stores.base import Tensors

Collate = Callable[[Sequence[Sample]], Batch]
STAND_IN_TOKENS = 8
READ_BYTES = 64 << 20
"""Samples that are read in one round trip."""


class _Held(NamedTuple):
    seq: int
    handle: FeatureHandle | None


class WindowReader:
    """Reads and collates windows, and holds what it read until the optimizer step that used it has run.

    A skipped sample keeps its place as a few tokens without loss weight.

    Args:
        windows: indices of the windows to read.
    """

    def __init__(
        self,
        source: RefSource,
        order: PassOrder,
        collate: Collate,
        windows: Iterator[int],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ):
        self._source = source
        self._order = order
        self._collate = collate
        self._windows = windows
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._held: deque[_Held] = deque()
        self._pending: list[WindowEntry] = []

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches, window by window."""
        for window in self._windows:
            seqs = rank_slice(window, self._global_batch_size, 0, 1)
            share = rank_slice(window, self._global_batch_size, self._rank, self._world_size)
            found = self._source.window(seqs, share, self._order)
            common = {"window_num_tokens": max(found.num_tokens, 1), "next_seq": seqs.stop}
            self._pending = list(found.entries)
            while self._pending:
                entries = self._next_chunk()
                samples = self._read(entries)
                self._pending = self._pending[len(entries) :]
                for start in range(0, len(samples), self._micro_batch_size):
                    yield self._collate(samples[start : start + self._micro_batch_size]) | common

    def release(self, next_seq: int) -> list[int]:
        """Give up what seqs below `next_seq` hold; returns those seqs."""
        released = []
        while self._held and self._held[0].seq < next_seq:
            released.append(self._held.popleft())
        self._source.store.release_many([one.handle for one in released if one.handle is not None])
        return [one.seq for one in released]

    def discard(self) -> None:
        """The run ended: free what was read and not used, and what was not read."""
        self.release(1 << 62)
        self._source.discard([entry.ref for entry in self._pending if entry.ref is not None])
        self._pending = []

    def _next_chunk(self) -> list[WindowEntry]:
        """Whole micro-batches, as many as one read should hold; at least one."""
        size, num_bytes = self._micro_batch_size, 0
        for count, entry in enumerate(self._pending):
            num_bytes += entry.ref.num_bytes if entry.ref is not None else 0
            if num_bytes > READ_BYTES:
                return self._pending[: max(size, count // size * size)]
        return self._pending

    def _read(self, entries: Sequence[WindowEntry]) -> list[Sample]:
        refs = [entry.ref for entry in entries if entry.ref is not None]
        found = iter(self._source.store.get_many(refs))
        return [self._sample(entry, None if entry.ref is None else next(found)) for entry in entries]

    def _sample(self, entry: WindowEntry, found: tuple[Tensors, FeatureHandle] | KeyError | None) -> Sample:
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
                )
            entry = self._source.replace(entry, str(found.args[0]) if found else "it was never read")
            if entry.ref is not None:
                (found,) = self._source.store.get_many([entry.ref])
        self._held.append(_Held(entry.seq, None))
        return stand_in(entry.seq, self._source.card)


def stand_in(seq: int, card: FeatureCard) -> Sample:
    """A sample of zeros that no loss covers."""
    n, size, dtype = STAND_IN_TOKENS, card.capture.hidden_size, getattr(torch, card.dtype)
    tensors = {
        "input_ids": torch.zeros(n, dtype=torch.int64),
        "loss_mask": torch.zeros(n, dtype=torch.uint8),
        "aux_hidden_states": torch.zeros(n, len(card.capture.layer_ids) * size, dtype=dtype),
        "last_hidden_state": torch.zeros(n, size, dtype=dtype),
    }
    kept = {name: tensors[name] for name in card.features}
    name = f"skipped:{seq}"
    return Sample(sample_id=name, source_id=name, pass_index=0, num_tokens=n, tensors=kept)
