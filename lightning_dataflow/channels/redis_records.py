"""Records as Redis holds them: a head of fixed size, which every reader of the log gets, and the line, which few need."""

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from lightning_dataflow.channels.heads import APPEND, KIND_CODES, NUM_COLUMNS, NUMBER, OFFSET, SEQ, SIZE, RecordHead
from lightning_dataflow.contracts import LogRecord

_HEAD = struct.Struct("<QQIIIB3x")
_HEADS = np.dtype(
    {
        "names": ("seq", "num_bytes", "num_tokens", "attempt", "size", "kind"),
        "formats": ("<i8", "<i8", "<u4", "<u4", "<u4", "u1"),
        "offsets": (0, 8, 16, 20, 24, 28),
        "itemsize": _HEAD.size,
    }
)
HEAD_BYTES = _HEAD.size
assert HEAD_BYTES == 32, "redis_log.lua cuts heads off by it"


def pack(record: LogRecord, line: bytes) -> bytes:
    """A record's head and its line."""
    kind, ref = KIND_CODES[record.kind], record.ref
    if ref is None:
        return _HEAD.pack(record.seq, 0, 0, 0, len(line), kind) + line
    return _HEAD.pack(record.seq, ref.num_bytes, ref.origin.num_tokens, ref.origin.attempt, len(line), kind) + line


def split(records: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The heads of packed records, and their lines."""
    heads, lines = [record[:HEAD_BYTES] for record in records], [record[HEAD_BYTES:] for record in records]
    return b"".join(heads), b"".join(lines)


def unpack(appends: Sequence[tuple[int, bytes]]) -> np.ndarray:
    """Rows of appends, each the number of its first record and its heads. No field is checked."""
    firsts = np.array([first for first, _ in appends], np.int64)
    counts = np.array([len(heads) // HEAD_BYTES for _, heads in appends], np.int64)
    packed = np.frombuffer(b"".join([heads for _, heads in appends]), _HEADS)
    rows = np.empty((len(packed), NUM_COLUMNS), np.int64)
    for column, name in enumerate(_HEADS.names or (), SEQ):
        rows[:, column] = packed[name]
    begins = np.cumsum(counts) - counts
    ends = np.cumsum(rows[:, SIZE])
    starts = ends - rows[:, SIZE]
    rows[:, APPEND] = np.repeat(firsts, counts)
    rows[:, NUMBER] = rows[:, APPEND] + np.arange(len(rows)) - np.repeat(begins, counts)
    rows[:, OFFSET] = starts - np.repeat(starts[begins], counts)
    return rows


class Piece(NamedTuple):
    """Lines that follow each other in what was appended at once.

    Attributes:
        append: number of its first record.
        offset: of the first of these lines, in bytes.
        sizes: of the lines.
    """

    append: int
    offset: int
    sizes: list[int]

    def cut(self, text: bytes) -> list[bytes]:
        """The lines."""
        ends = list(accumulate(self.sizes, initial=0))
        return [text[start:end] for start, end in pairwise(ends)]


def pieces_of(heads: Sequence[RecordHead], most_bytes: int) -> list[Piece]:
    """The lines of heads, in their order, in pieces of at most so many bytes unless one line has more."""
    pieces: list[Piece] = []
    append, end, room = -1, 0, 0
    for head in heads:
        if head.append != append or head.offset != end or head.size > room:
            append, room = head.append, most_bytes
            pieces.append(Piece(append, head.offset, []))
        pieces[-1].sizes.append(head.size)
        end, room = head.offset + head.size, room - head.size
    return pieces
