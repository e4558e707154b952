"""Records as Redis holds them: a head of fixed size, which every reader of the log gets, and the line, which few need."""

import struct
from collections.abc import Sequence

import numpy as np

from lightning_dataflow.channels.heads import ROW, head_of
from lightning_dataflow.contracts import LogRecord

_HEAD = struct.Struct("<QQIIIB3x")
_FIELDS = [name for name in ROW.names or () if name != "number"]
_HEADS = np.dtype(
    {
        "names": _FIELDS,
        "formats": [ROW[name] for name in _FIELDS],
        "offsets": [0, 8, 16, 20, 24, 28],
        "itemsize": _HEAD.size,
    }
)
HEAD_BYTES = _HEAD.size
assert HEAD_BYTES == 32, "redis_log.lua cuts heads off by it"


def pack(record: LogRecord, line: bytes) -> bytes:
    """A record's head and its line."""
    head = head_of(record, 0)
    return _HEAD.pack(head.seq, head.num_bytes, head.num_tokens, head.attempt, len(line), head.kind) + line


def split(records: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """The heads of packed records, and their lines."""
    return b"".join([record[:HEAD_BYTES] for record in records]), [record[HEAD_BYTES:] for record in records]


def unpack(heads: bytes, numbers: np.ndarray) -> np.ndarray:
    """Rows of dtype ROW, whose fields are not checked."""
    packed = np.frombuffer(heads, _HEADS)
    rows = np.empty(len(packed), ROW)
    rows["number"] = numbers
    for name in _FIELDS:
        rows[name] = packed[name]
    return rows
