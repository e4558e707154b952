"""Heads of records: the little that every reader needs of every record, as columns."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np

from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.contracts.log import MAX_SEQ, Kind

KINDS: tuple[Kind, ...] = ("begin", "ref", "supersede", "skip", "end")
KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}
REF, SUPERSEDE = KIND_CODES["ref"], KIND_CODES["supersede"]
NUMBER, SEQ, NUM_BYTES, NUM_TOKENS, ATTEMPT, SIZE, KIND, PLACE, OFFSET = range(9)
"""Columns of rows, whole numbers of 64 bits: the fields of RecordHead."""
NUM_COLUMNS = 9


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
    """Index of the first row that no record can have."""
    seqs, num_bytes = rows[:, SEQ], rows[:, NUM_BYTES]
    damaged = (rows[:, KIND] >= len(KINDS)) | (seqs > MAX_SEQ) | (seqs < 0) | (num_bytes < 0)
    return int(damaged.argmax()) if damaged.any() else None
