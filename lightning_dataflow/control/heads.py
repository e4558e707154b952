"""Heads of records: the little that every reader needs of every record, as columns."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np

from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.contracts.log import MAX_SEQ, Kind
from lightning_dataflow.contracts.validation import MAX_ATTEMPT, MAX_SAMPLE_BYTES, MAX_TOKENS

MAX_LINE_BYTES = 1 << 20
KINDS: tuple[Kind, ...] = ("begin", "ref", "supersede", "skip", "end")
KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}
REF, SUPERSEDE = KIND_CODES["ref"], KIND_CODES["supersede"]
NUMBER, SEQ, NUM_BYTES, NUM_TOKENS, ATTEMPT, SIZE, KIND, PLACE, OFFSET = range(9)
"""Columns of rows, whole numbers of 64 bits: the fields of RecordHead."""
NUM_COLUMNS = 9

MAX_NUMBER = 1 << 62
"""Below it are the numbers that a channel gives."""


class RecordHead(NamedTuple):
    """A row of heads.

    Attributes:
        number: tells the records apart that one reader has read; from 1.
        attempt, num_tokens, num_bytes: of its ref; 0 without one.
        size: of its line in bytes, where the channel needs it.
        kind: its place in KINDS.
        place, offset: where the channel finds its line.
    """

    number: int
    seq: int
    num_bytes: int
    num_tokens: int
    attempt: int
    size: int
    kind: int
    place: int = 0
    offset: int = 0

    @property
    def has_ref(self) -> bool:
        """Whether there are features to read."""
        return self.kind in (REF, SUPERSEDE)


class Heads(NamedTuple):
    """What `poll_heads` returns.

    Attributes:
        rows: [number of records, NUM_COLUMNS] of int64, in the order of the log.
        records: of the rows, where the channel had to read them anyway.
    """

    rows: np.ndarray
    records: Sequence[LogRecord] | None = None

    def __bool__(self) -> bool:
        return len(self.rows) > 0


def head_of(record: LogRecord, number: int) -> RecordHead:
    """Of a record that has been read."""
    kind, ref = KIND_CODES[record.kind], record.ref
    if ref is None:
        return RecordHead(number, record.seq, 0, 0, 0, 0, kind)
    return RecordHead(number, record.seq, ref.num_bytes, ref.num_tokens, ref.origin.attempt, 0, kind)


def rows_of(heads: Iterable[RecordHead]) -> np.ndarray:
    """Heads as rows."""
    return np.array(list(heads), np.int64).reshape(-1, NUM_COLUMNS)


def heads_in(rows: np.ndarray) -> list[RecordHead]:
    """Rows one by one."""
    return list(map(RecordHead._make, rows.tolist()))


def have_refs(rows: np.ndarray) -> np.ndarray:
    """Which rows have features to read."""
    kinds = rows[:, KIND]
    return cast(np.ndarray, (kinds == REF) | (kinds == SUPERSEDE))


def first_damaged(rows: np.ndarray) -> int | None:
    """Index of the first row that no record can have, of a channel that needs sizes of lines."""
    refs, counts = have_refs(rows), rows[:, [NUM_BYTES, NUM_TOKENS, ATTEMPT]]
    least, most = (
        np.where(refs[:, None], (1, 1, 0), 0),
        np.where(refs[:, None], (MAX_SAMPLE_BYTES, MAX_TOKENS, MAX_ATTEMPT), 0),
    )
    damaged = ((counts < least) | (counts > most)).any(axis=1)
    for column, lowest, highest in ((KIND, 0, len(KINDS) - 1), (SEQ, 0, MAX_SEQ), (SIZE, 1, MAX_LINE_BYTES)):
        damaged |= (rows[:, column] < lowest) | (rows[:, column] > highest)
    return int(damaged.argmax()) if damaged.any() else None
