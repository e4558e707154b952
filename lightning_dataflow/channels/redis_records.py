"""Records as Redis holds them: a head of fixed size, which every reader of the log gets, and the line, which few need."""

import struct
from collections.abc import Sequence
from itertools import count, repeat

from lightning_dataflow.channels.base import RecordHead
from lightning_dataflow.contracts import LogRecord, UserError
from lightning_dataflow.contracts.log import MAX_SEQ, Kind

_HEAD = struct.Struct("<QQIIIB3x")
HEAD_BYTES = _HEAD.size
assert HEAD_BYTES == 32, "redis_log.lua cuts heads off by it"
KINDS: tuple[Kind, ...] = ("begin", "ref", "supersede", "skip", "end")


def pack(record: LogRecord, line: bytes) -> bytes:
    """A record's head and its line."""
    kind, ref = KINDS.index(record.kind), record.ref
    if ref is None:
        return _HEAD.pack(record.seq, 0, 0, 0, len(line), kind) + line
    return _HEAD.pack(record.seq, ref.num_bytes, ref.num_tokens, ref.origin.attempt, len(line), kind) + line


def split(records: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """The heads of packed records, and their lines."""
    return b"".join([record[:HEAD_BYTES] for record in records]), [record[HEAD_BYTES:] for record in records]


def unpack(heads: bytes, first: int) -> list[RecordHead]:
    """The heads of one append, the first of which has the number `first`. Raises UserError for something else."""
    if len(heads) % HEAD_BYTES:
        raise UserError(f"{len(heads)} bytes of heads are no whole number of them")
    columns = list(zip(*_HEAD.iter_unpack(heads), strict=True))
    if not columns:
        return []
    *numbers, kinds = columns
    if max(kinds) >= len(KINDS) or max(numbers[0]) > MAX_SEQ:
        raise UserError(f"record {first} or one after it has kind {max(kinds)} and seq {max(numbers[0])}")
    fields = zip(count(first), *numbers, [KINDS[kind] for kind in kinds], repeat(None), strict=False)
    return list(map(tuple.__new__, repeat(RecordHead), fields))
