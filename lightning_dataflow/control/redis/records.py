"""Records as Redis holds them: a head of fixed size, which every reader of the log gets, and the line, which few need."""

import struct
from collections.abc import Sequence

import numpy as np

from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.control.heads import KIND_CODES, NUM_COLUMNS, NUMBER, OFFSET, PLACE, SEQ, SIZE

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
CHUNK = 8
"""Lines that are kept, and read, together."""
assert (HEAD_BYTES, CHUNK) == (32, 8), "log.lua goes by them"


def pack(record: LogRecord, line: bytes) -> bytes:
    """A record's head and its line."""
    kind, ref = KIND_CODES[record.kind], record.ref
    if ref is None:
        return _HEAD.pack(record.seq, 0, 0, 0, len(line), kind) + line
    return _HEAD.pack(record.seq, ref.num_bytes, ref.origin.num_tokens, ref.origin.attempt, len(line), kind) + line


def split(records: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """The heads of packed records, and their lines in chunks."""
    lines = [record[HEAD_BYTES:] for record in records]
    chunks = [b"".join(lines[first : first + CHUNK]) for first in range(0, len(lines), CHUNK)]
    return b"".join([record[:HEAD_BYTES] for record in records]), chunks


def unpack(appends: Sequence[tuple[int, bytes]]) -> np.ndarray:
    """Rows of appends, each the number of its first record and its heads. No field is checked."""
    firsts = np.array([first for first, _ in appends], np.int64)
    counts = np.array([len(heads) // HEAD_BYTES for _, heads in appends], np.int64)
    packed = np.frombuffer(b"".join([heads for _, heads in appends]), _HEADS)
    rows = np.empty((len(packed), NUM_COLUMNS), np.int64)
    for column, name in enumerate(_HEADS.names or (), SEQ):
        rows[:, column] = packed[name]
    begins = np.repeat(np.cumsum(counts) - counts, counts)
    within = np.arange(len(rows)) - begins
    chunk = within // CHUNK * CHUNK
    starts = np.cumsum(rows[:, SIZE]) - rows[:, SIZE]
    first = np.repeat(firsts, counts)
    rows[:, NUMBER] = first + within
    rows[:, PLACE] = first + chunk
    rows[:, OFFSET] = starts - starts[begins + chunk]
    return rows
