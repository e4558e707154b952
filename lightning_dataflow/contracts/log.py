"""Records of the log that carries references from producers to trainers."""

from collections.abc import Callable
from typing import Any, Literal, Self, cast, get_args

from lightning_dataflow.contracts.errors import UserError
from lightning_dataflow.contracts.records import SCHEMA_VERSION, SampleRef
from lightning_dataflow.contracts.validation import MAX_SAMPLE_BYTES, MAX_TOKENS

Kind = Literal["begin", "ref", "supersede", "skip", "end"]
MAX_SEQ = 10**14 - 1
"""Lua, which runs in Redis, writes whole numbers of up to 14 digits."""
MAX_REASON = 500
KINDS = frozenset(get_args(Kind))


class LogRecord:
    """One line of the log.

    The ref of a line that was read is built and checked when it is first asked for: each rank reads all lines, and needs
    only the refs of its share.

    Attributes:
        kind: `ref`: the features of a seq are in the store. `supersede`: the same seq again, its older generation was
            lost. `skip`: the seq keeps its place without features. `begin`: a trainer starts at this seq; an `end` before
            it no longer holds. `end`: no seq from this one on will follow.
        seq: position of the sample in the run, over all passes.
        reason: of `skip`.
        attempt, num_bytes: of the ref; 0 without one.
        num_tokens: of the sample, as far as is known: a sample that was skipped because of its features counts like others
            where a window's tokens are counted; otherwise 0 without a ref.
    """

    def __init__(
        self, *, kind: Kind, seq: int, ref: SampleRef | None = None, reason: str | None = None, num_tokens: int = 0
    ):
        self.kind = kind
        self.seq = seq
        self.reason = reason
        self.attempt, self.num_tokens, self.num_bytes = (0, num_tokens, 0) if ref is None else _counts(ref)
        self._ref = ref
        self._read_ref: Callable[[], SampleRef] | None = None

    @classmethod
    def of_line(cls, kind: Kind, seq: int, counts: tuple[int, int, int], read_ref: Callable[[], SampleRef]) -> Self:
        """A record with a ref, of which a line says that it has those counts."""
        record = cls(kind=kind, seq=seq)
        record.attempt, record.num_tokens, record.num_bytes = counts
        record._read_ref = read_ref
        return record

    @property
    def has_ref(self) -> bool:
        """Whether there are features to read."""
        return self.kind in ("ref", "supersede")

    @property
    def ref(self) -> SampleRef | None:
        """Of `ref` and `supersede`. Raises UserError when the line that was read is damaged."""
        if self._ref is None and self._read_ref is not None:
            self._ref = self._read_ref()
        return self._ref

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogRecord) and self._fields() == other._fields()

    def __repr__(self) -> str:
        return f"LogRecord{self._fields()}"

    def _fields(self) -> tuple[Any, ...]:
        return self.kind, self.seq, self.ref, self.reason, self.num_tokens


def _counts(ref: SampleRef) -> tuple[int, int, int]:
    return ref.origin.attempt, ref.origin.num_tokens, ref.num_bytes


def replaces(record: LogRecord, known: LogRecord) -> bool:
    """Whether `record` counts instead of `known`, an earlier record of its seq, for every reader of the log.

    A later attempt does, and so does giving up, which is final. A second record of one attempt does not.
    """
    if not record.has_ref or not known.has_ref:
        return known.has_ref
    return record.attempt > known.attempt


def record_from_json(data: Any, run_id: str | None, read_ref: Callable[[], SampleRef]) -> LogRecord:
    """The record of a parsed line of JSON. Raises UserError for anything malformed, but for the rest of a ref.

    Args:
        run_id: of the log; a ref of another run is refused.
        read_ref: builds and checks the ref of the line.
    """
    kind, seq = (data.get("kind"), data.get("seq")) if isinstance(data, dict) else (None, None)
    if kind not in KINDS or type(seq) is not int or not 0 <= seq <= MAX_SEQ:
        raise UserError(f"not a log record: {str(data)[:80]}")
    kind = cast(Kind, kind)
    if kind in ("ref", "supersede"):
        return LogRecord.of_line(kind, seq, _checked_counts(data, run_id, read_ref), read_ref)
    reason = data.get("reason")
    if kind == "skip" and not (isinstance(reason, str) and 0 < len(reason) <= MAX_REASON):
        raise UserError(f"the skip of seq {seq} gives no reason: {str(reason)[:80]}")
    if kind != "skip":
        return LogRecord(kind=kind, seq=seq)
    num_tokens = data.get("num_tokens", 0)
    if type(num_tokens) is not int or not 0 <= num_tokens <= MAX_TOKENS:
        raise UserError(f"the skip of seq {seq} is of {str(num_tokens)[:80]} tokens, expected 0 to {MAX_TOKENS}")
    return LogRecord(kind=kind, seq=seq, reason=reason, num_tokens=num_tokens)


def _checked_counts(data: Any, run_id: str | None, read_ref: Callable[[], SampleRef]) -> tuple[int, int, int]:
    """What every reader uses of a ref."""
    try:
        ref, origin = data["ref"], data["ref"]["origin"]
        counts = origin["attempt"], origin["num_tokens"], ref["num_bytes"]
        are_valid = all(type(count) is int and 0 <= count <= MAX_SAMPLE_BYTES for count in counts)
    except (KeyError, TypeError):
        are_valid = False
    if not are_valid or ref["schema_version"] != SCHEMA_VERSION:
        return _counts(read_ref())  # which raises the error
    if origin["run_id"] != run_id:
        raise UserError(f"it is of run {str(origin['run_id'])[:80]}, the card is of run {run_id}: two runs were mixed")
    return counts
