"""Records of the log that carries references from producers to trainers."""

from typing import Any, Literal, NamedTuple, cast, get_args

from lightning_dataflow.contracts.errors import UserError
from lightning_dataflow.contracts.records import SampleRef
from lightning_dataflow.contracts.validation import ref_from_json

Kind = Literal["begin", "ref", "supersede", "skip", "end"]
MAX_SEQ = 10**14 - 1
"""Lua, which runs in Redis, writes whole numbers of up to 14 digits."""
MAX_REASON = 500
KINDS = frozenset(get_args(Kind))


class LogRecord(NamedTuple):
    """One line of the log.

    Attributes:
        kind: `ref`: the features of a seq are in the store. `supersede`: the same seq again, its older generation was
            lost. `skip`: the seq keeps its place without features. `begin`: a trainer starts at this seq; an `end` before
            it no longer holds. `end`: no seq from this one on will follow.
        seq: position of the sample in the run, over all passes.
        ref: of `ref` and `supersede`.
        reason: of `skip`.
    """

    kind: Kind
    seq: int
    ref: SampleRef | None = None
    reason: str | None = None


def replaces(record: LogRecord, known: LogRecord) -> bool:
    """Whether `record` counts instead of `known`, an earlier record of its seq, for every reader of the log.

    A later attempt does, and so does giving up, which is final. A second record of one attempt does not.
    """
    if record.ref is None or known.ref is None:
        return known.ref is not None
    return record.ref.origin.attempt > known.ref.origin.attempt


def record_from_json(data: Any) -> LogRecord:
    """Rebuild and validate a record from the parsed line of JSON. Raises UserError for anything malformed."""
    kind, seq = (data.get("kind"), data.get("seq")) if isinstance(data, dict) else (None, None)
    if kind not in KINDS or not isinstance(seq, int) or isinstance(seq, bool) or not 0 <= seq <= MAX_SEQ:
        raise UserError(f"not a log record: {str(data)[:80]}")
    if kind in ("ref", "supersede"):
        return LogRecord(kind=cast(Kind, kind), seq=seq, ref=ref_from_json(data.get("ref")))
    reason = data.get("reason")
    if kind == "skip" and not (isinstance(reason, str) and 0 < len(reason) <= MAX_REASON):
        raise UserError(f"the skip of seq {seq} gives no reason: {str(reason)[:80]}")
    return LogRecord(kind=cast(Kind, kind), seq=seq, reason=reason if kind == "skip" else None)
