"""Records as Redis holds them: a head of fixed size, which every reader of the log gets, and the line, which few need."""

import struct
from collections.abc import Iterator

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


def unpack(heads: bytes, first: int) -> Iterator[RecordHead]:
    """The heads of one append, the first of which has the number `first`. Raises UserError for something else."""
    if len(heads) % HEAD_BYTES:
        raise UserError(f"{len(heads)} bytes of heads are no whole number of them")
    for number, (seq, num_bytes, num_tokens, attempt, size, kind) in enumerate(_HEAD.iter_unpack(heads), first):
        if kind >= len(KINDS) or seq > MAX_SEQ:
            raise UserError(f"record {number} has kind {kind} and seq {seq}")
        yield tuple.__new__(RecordHead, (number, seq, num_bytes, num_tokens, attempt, size, KINDS[kind], None))
