"""The contract of every channel."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from lightning_dataflow.contracts import LogRecord, PeerTimeoutError, UserError, assert_no_tensors
from lightning_dataflow.contracts.log import record_to_json
from lightning_dataflow.control.heads import MAX_LINE_BYTES, Heads, head_of, rows_of

POLL_S = (0.002, 0.05)
"""Waits between two looks at a log without news: they grow from the first to the second."""
_AS_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS


class StreamingRefChannel(ABC):
    """An append-only log of LogRecords, and the card of the run that they belong to.

    Any number of processes append; each reader has a position of its own. The log is the truth about what was published;
    whatever else counts it is rebuilt from it. How far training has come is no part of it: see MetadataStore.
    """

    name: str
    """Where the log is, for messages."""

    _numbers: Iterator[int]

    @abstractmethod
    def announce(self, card: Mapping[str, Any]) -> None:
        """Say what run this is; plain data. Whoever comes second must say the same: UserError names the difference."""

    @abstractmethod
    def card(self) -> dict[str, Any] | None:
        """What was announced; None before that."""

    @abstractmethod
    def nonce(self) -> str:
        """A random name of this log, which no other log has, not even that of another run with the same name.

        Made by the first caller. It tells apart what runs of one name keep in a shared store.
        """

    @abstractmethod
    def append(self, lines: Sequence[bytes]) -> None:
        """Append encoded records at once: a reader sees them in this order, and none from another writer between them."""

    def encode(self, record: LogRecord) -> bytes:
        """A record as `append` takes it: a line of JSON.

        Raises:
            TypeError: it carries a tensor, whose path is named, or anything else that is no plain data.
            UserError: it is longer than readers accept.
        """
        try:
            line = orjson.dumps(record_to_json(record), _refuse, _AS_LINE)
        except TypeError as error:
            assert_no_tensors(record, "record")
            raise (error.__cause__ or error) from None
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"the record of seq {record.seq} has {len(line)} bytes, the limit is {MAX_LINE_BYTES}: give its sample "
                "less metadata"
            )
        return line

    def publish(self, records: Sequence[LogRecord]) -> None:
        """Encode and append."""
        self.append([self.encode(record) for record in records])

    @abstractmethod
    def poll(self, max_records: int = 1024) -> list[LogRecord]:
        """The next complete records after this reader's position, [] when there are none yet.

        Raises UserError for a record that is malformed, of another run or another schema.
        """

    def poll_heads(self, max_records: int = 1024) -> Heads:
        """As `poll`, only what every reader needs; a channel that has to read the records anyway gives them along."""
        records = self.poll(max_records)
        return Heads(rows_of(head_of(record, next(self._numbers)) for record in records), records)

    def load(self, rows: np.ndarray) -> list[LogRecord]:
        """The records of rows of heads, where `poll_heads` of this reader gave none along."""
        assert len(rows) == 0, "poll_heads gave them"
        return []

    @abstractmethod
    def rewind(self) -> None:
        """Read from the start again."""

    @abstractmethod
    def trim(self, seq: int) -> None:
        """Drop what this reader has read and what only concerns seqs below `seq`, in so far as that is cheap."""

    def close(self, total: int) -> None:
        """Publish that no seq from `total` on will follow."""
        self.publish([LogRecord(kind="end", seq=total)])

    def wait_for_card(self, timeout_s: float, who: str) -> dict[str, Any]:
        """The card, once somebody announced it. Raises PeerTimeoutError naming `who`."""
        deadline = time.monotonic() + timeout_s
        while (card := self.card()) is None:
            if time.monotonic() > deadline:
                raise PeerTimeoutError(
                    f"waited {timeout_s:.0f} s for {who} to announce the run in {self.name}: is it running, with "
                    "this run_name and channel.path?"
                )
            time.sleep(POLL_S[1])
        return card

    def stream(self, idle_timeout_s: float) -> Iterator[LogRecord]:
        """Records as they come, up to `end`. Raises PeerTimeoutError when none came for `idle_timeout_s`."""
        last, wait = time.monotonic(), POLL_S[0]
        while True:
            records = self.poll()
            for record in records:
                yield record
                if record.kind == "end":
                    return
            if records:
                last, wait = time.monotonic(), POLL_S[0]
            elif time.monotonic() - last > idle_timeout_s:
                raise PeerTimeoutError(f"no record came in {idle_timeout_s:.0f} s from the producers of {self.name}")
            else:
                time.sleep(wait)
                wait = min(2 * wait, POLL_S[1])


def _refuse(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} cannot be logged: records hold plain data")


def check_card(found: Mapping[str, Any], mine: Mapping[str, Any], where: str) -> None:
    """Raise UserError naming the first field in which an announced card differs from `mine`."""
    difference = _difference(found, mine)
    if difference is not None:
        name, theirs, ours = difference
        raise UserError(
            f"{where} belongs to a run with another {name} ({str(theirs)[:60]}, here {str(ours)[:60]}): give all processes "
            "of a run the same settings, or choose another run_name"
        )


def _difference(found: Mapping[str, Any], mine: Mapping[str, Any], path: str = "") -> tuple[str, Any, Any] | None:
    for name in sorted(found.keys() | mine.keys()):
        theirs, ours = found.get(name), mine.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            if (inner := _difference(theirs, ours, f"{path}{name}.")) is not None:
                return inner
        elif theirs != ours:
            return f"{path}{name}", theirs, ours
    return None
