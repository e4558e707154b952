"""Deterministic sharding: one order of samples for every topology, world size and micro-batch size.

Seqs number samples across passes: pass p over n samples is seqs [p·n, (p + 1)·n), each pass in an order of its own. A
window is the consecutive seqs of one optimizer step, laid out in rows: one sample per row, or as many as fit into
`row_tokens` (packing). Every rank computes the same windows and takes its contiguous share of the rows, so the samples of
a step depend only on the seed, the batching and the samples' lengths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch

from lightning_dataflow.contracts import UserError

MIN_ROW_TOKENS = 8
Rows = TypeVar("Rows", bound=Sequence[Any])


class PassOrder:
    """Maps seqs to samples, by one permutation per pass that `seed` determines."""

    def __init__(self, num_samples: int, seed: int):
        assert num_samples > 0, "sources refuse to be empty"
        self.num_samples = num_samples
        self.seed = seed

    def locate(self, seq: int) -> tuple[int, int]:
        """(index of the sample, pass)."""
        pass_index, position = divmod(seq, self.num_samples)
        return _permutation(self.num_samples, self.seed, pass_index)[position], pass_index


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, pass_index: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed << 20) + pass_index)
    return torch.randperm(num_samples, generator=generator).tolist()


@dataclass(frozen=True, kw_only=True)
class Window:
    """The samples of one optimizer step, over all ranks.

    Attributes:
        seqs: consecutive.
        rows: the same seqs by row of the batches; a row may be empty.
    """

    seqs: range
    rows: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How seqs become windows, and windows micro-batches.

    Attributes:
        global_batch_size: G, samples of a window; with packing, at most.
        micro_batch_size: rows of one forward pass of a rank.
        row_tokens: pack samples into rows of this many tokens; None for one sample per row.
        rows_per_step: with packing, rows of a window, over all ranks.
    """

    global_batch_size: int
    micro_batch_size: int = 1
    row_tokens: int | None = None
    rows_per_step: int | None = None

    def __post_init__(self) -> None:
        if (self.row_tokens is None) != (self.rows_per_step is None):
            raise UserError(
                f"row_tokens={self.row_tokens} and rows_per_step={self.rows_per_step}: packing needs both, the length of a "
                "row and the rows of an optimizer step; set both or neither"
            )
        if self.row_tokens is not None and self.row_tokens < MIN_ROW_TOKENS:
            raise UserError(f"row_tokens={self.row_tokens}: a row holds {MIN_ROW_TOKENS} tokens or more")

    @property
    def packed(self) -> bool:
        """Whether a row may hold several samples."""
        return self.row_tokens is not None

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step and rank. Raises UserError unless the sizes divide."""
        name, total = "global_batch_size", self.global_batch_size
        if self.rows_per_step is not None:
            name, total = "rows_per_step", self.rows_per_step
        rows = self.micro_batch_size * world_size
        if min(total, self.micro_batch_size, self.global_batch_size) < 1 or total % rows:
            raise UserError(
                f"{name}={total} is not a multiple of micro_batch_size={self.micro_batch_size} × "
                f"{world_size} ranks = {rows}: change one of the three"
            )
        return total // rows

    def window(self, start: int, num_tokens: Callable[[int], int]) -> Window:
        """The window that begins at seq `start`.

        With packing, each sample goes into the first row that has room for it, in order. The window ends before the first
        sample that fits nowhere. `num_tokens` is called seq by seq up to that one, and at most G times.
        """
        if self.row_tokens is None or self.rows_per_step is None:
            seqs = range(start, start + self.global_batch_size)
            return Window(seqs=seqs, rows=[[seq] for seq in seqs])
        room = [self.row_tokens] * self.rows_per_step
        rows: list[list[int]] = [[] for _ in room]
        for seq in range(start, start + self.global_batch_size):
            length = num_tokens(seq)
            row = next((index for index, free in enumerate(room) if length <= free), None)
            if row is None:
                if length > self.row_tokens:
                    raise UserError(
                        f"the sample at seq {seq} has {length} tokens, a row holds row_tokens={self.row_tokens}: raise it, "
                        "or cut samples to data.max_length"
                    )
                return Window(seqs=range(start, seq), rows=rows)
            room[row] -= length
            rows[row].append(seq)
        return Window(seqs=range(start, start + self.global_batch_size), rows=rows)


def share_of(rows: Rows, rank: int, world_size: int) -> Rows:
    """The rows of `rank`, of all rows of a window."""
    share = len(rows) // world_size
    return cast(Rows, rows[rank * share : (rank + 1) * share])
