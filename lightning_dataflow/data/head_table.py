"""Heads of what is in flight, by seq: a rank that reads the heads of all ranks' samples must not pay for each."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control.heads import NUM_COLUMNS, NUMBER, SEQ, RecordHead

MAX_AHEAD = 1 << 24
"""Seqs that a log may hold beyond the first of interest; memory grows with them."""


class HeadTable:
    """One head for each seq from `start` on, where there is one. Not safe for threads.

    A head can be marked; whatever is put in its place is not.
    """

    def __init__(self, start: int):
        self.start = start
        self._rows = np.zeros((0, NUM_COLUMNS), np.int64)  # number 0: none
        self._marked = np.zeros(0, bool)

    def get(self, seq: int) -> RecordHead | None:
        """The head of a seq."""
        at = seq - self.start
        if not 0 <= at < len(self._rows) or not self._rows[at, NUMBER]:
            return None
        return RecordHead(*self._rows[at].tolist())

    def put(self, rows: np.ndarray) -> None:
        """Keep rows of seqs from `start` on, in the place of others. Raises UserError for seqs that no log can hold."""
        at = self._places(rows[:, SEQ])
        self._grow(int(at.max()) + 1)
        self._rows[at] = rows
        self._marked[at] = False

    def has_none_of(self, seqs: np.ndarray) -> bool:
        """Whether these seqs are all different, from `start` on, and without a head."""
        at = seqs - self.start
        known = at[at < len(self._rows)]
        ordered = np.sort(at)
        return bool(ordered[0] >= 0 and (ordered[1:] != ordered[:-1]).all() and not self._rows[known, NUMBER].any())

    def missing(self, seqs: range) -> np.ndarray:
        """Those of `seqs` without a head."""
        there = np.zeros(len(seqs), bool)
        known = self.rows(seqs)[:, NUMBER] != 0
        there[: len(known)] = known
        return cast(np.ndarray, np.arange(seqs.start, seqs.stop)[~there])

    def rows(self, seqs: range) -> np.ndarray:
        """Those of consecutive seqs, with number 0 where there is none; the last may be left out."""
        assert seqs.start >= self.start, "those before have been dropped"
        return self._rows[seqs.start - self.start : seqs.stop - self.start]

    def pick(self, seqs: Sequence[int]) -> np.ndarray:
        """The rows of seqs that all have one, as a copy."""
        at = np.array(seqs, np.int64) - self.start
        assert not len(at) or at.min() >= 0, "those before have been dropped"
        return self._rows[at]

    def all_rows(self) -> np.ndarray:
        """The rows of all seqs that have one, as a copy."""
        return self._rows[self._rows[:, NUMBER] != 0]

    def mark(self, seqs: range) -> None:
        """Mark the heads of seqs that all have one."""
        assert seqs.start >= self.start, "those before have been dropped"
        self._marked[seqs.start - self.start : seqs.stop - self.start] = True

    def drop(self, next_seq: int) -> np.ndarray:
        """Forget all before `next_seq`, where the table starts from now on. Returns the rows of those that had no mark."""
        count = max(next_seq - self.start, 0)
        rows, marked = self._rows[:count], self._marked[:count]
        dropped = rows[(rows[:, NUMBER] != 0) & ~marked]
        self._rows, self._marked = self._rows[count:], self._marked[count:]
        self.start += count
        return dropped

    def _places(self, seqs: np.ndarray) -> np.ndarray:
        at = seqs - self.start
        if (highest := int(at.max())) > MAX_AHEAD:
            raise UserError(
                f"the log holds seq {highest + self.start}, over {MAX_AHEAD} after seq {self.start}, where this trainer "
                "begins: resume from a later checkpoint, or start again under another run_name"
            )
        return at

    def _grow(self, size: int) -> None:
        if size > len(self._rows):
            grown = max(size, 2 * len(self._rows))
            rows, marked = np.zeros((grown, NUM_COLUMNS), np.int64), np.zeros(grown, bool)
            rows[: len(self._rows)], marked[: len(self._rows)] = self._rows, self._marked
            self._rows, self._marked = rows, marked
