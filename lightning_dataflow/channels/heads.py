"""Heads of records: the little that every reader needs of every record, as columns."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.contracts.log import MAX_SEQ, Kind

KINDS: tuple[Kind, ...] = ("begin", "ref", "supersede", "skip", "end")
KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}
REF, SUPERSEDE = KIND_CODES["ref"], KIND_CODES["supersede"]
ROW = np.dtype(
    [
        ("number", "<u8"),
        ("seq", "<u8"),
        ("num_bytes", "<u8"),
        ("num_tokens", "<u4"),
        ("attempt", "<u4"),
        ("size", "<u4"),
        ("kind", "u1"),
        ("append", "<u8"),
        ("offset", "<u8"),
    ]
)


class RecordHead(NamedTuple):
    """A row of heads.

    Attributes:
        number: tells the records apart that one reader has read; from 1.
        attempt, num_tokens, num_bytes: of its ref; 0 without one.
        size: of its line in bytes, where the channel needs it.
        kind: its place in KINDS.
        append, offset: where the channel finds its line.
    """

    number: int
    seq: int
    num_bytes: int
    num_tokens: int
    attempt: int
    size: int
    kind: int
    append: int = 0
    offset: int = 0

    @property
    def has_ref(self) -> bool:
        """Whether there are features to read."""
        return self.kind in (REF, SUPERSEDE)


class Heads(NamedTuple):
    """What `poll_heads` returns.

    Attributes:
        rows: of dtype ROW, in the order of the log.
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


def heads_in(rows: np.ndarray) -> list[RecordHead]:
    """Rows one by one."""
    return [RecordHead(*row) for row in rows.tolist()]


def have_refs(rows: np.ndarray) -> np.ndarray:
    """Which rows have features to read."""
    return cast(np.ndarray, (rows["kind"] == REF) | (rows["kind"] == SUPERSEDE))


def first_damaged(rows: np.ndarray) -> int | None:
    """Index of the first row that no record can have."""
    damaged = (rows["kind"] >= len(KINDS)) | (rows["seq"] > MAX_SEQ)
    return int(damaged.argmax()) if damaged.any() else None
