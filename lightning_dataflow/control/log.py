"""The contract of every channel."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any, Literal

import orjson

from lightning_dataflow.contracts import (
    SCHEMA_VERSION,
    LogRecord,
    PeerTimeoutError,
    SampleRef,
    UserError,
    assert_no_tensors,
)
from lightning_dataflow.contracts.log import MAX_REASON, record_from_json
from lightning_dataflow.contracts.validation import check_id, check_schema, ref_from_json
from lightning_dataflow.contracts.waiting import Wait

MAX_LINE_BYTES = 1 << 20
POLL_S = (0.002, 0.05)
"""Pauses between two looks at a log: they grow from the first to the second."""


class StreamingRefChannel(ABC):
    """An append-only log of LogRecords, and the card of the run that they belong to.

    Any number of processes append; each reader has a position of its own. The log is the truth about what was published;
    whatever else counts it is rebuilt from it. How far training has come is no part of it: see MetadataStore.

    Attributes:
        name: where the log is, for messages.
    """

    name: str
    _run_id: str | None = None

    def announce(self, card: Mapping[str, Any]) -> None:
        """Say what run this is; plain data. Whoever comes second must say the same: UserError names the difference."""
        assert_no_tensors(card, "card")
        mine = orjson.dumps({**card, "schema_version": SCHEMA_VERSION})
        self._write_once("card", mine)
        found = self.card()
        check_card({"schema_version": SCHEMA_VERSION, **(found or {})}, orjson.loads(mine), self.name)

    def card(self) -> dict[str, Any] | None:
        """What was announced; None before that. Raises UserError for a log of another release."""
        text = self._read("card")
        if text is None:
            return None
        try:
            card = orjson.loads(text)
            version, self._run_id = card.pop("schema_version"), check_id(card["run_id"], "run_id")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the card of {self.name} is damaged ({error!r}): start again under another run_name, or remove the run"
            ) from error
        check_schema(version, self.name, "finish the run with the release that began it, or choose another run_name")
        return card

    def nonce(self) -> str:
        """A random name of this log, which no other log has, not even that of another run with the same name.

        Made by the first caller. It tells apart what runs of one name keep in a shared store.
        """
        while (nonce := self._read("nonce")) is None:
            self._write_once("nonce", secrets.token_hex(8).encode())
        return check_id(nonce.decode(errors="replace"), f"the nonce of {self.name}")

    def first_day(self, today: date) -> date:
        """The day on which the run began: `today` of the first caller. Chat templates write it in every process.

        Raises UserError for one that is damaged.
        """
        while (day := self._read("date")) is None:
            self._write_once("date", today.isoformat().encode())
        try:
            return date.fromisoformat(day.decode())
        except ValueError as error:
            raise UserError(
                f"the date of {self.name} is damaged ({error!r}): set data.date, or start again under another run_name"
            ) from error

    @abstractmethod
    def append(self, lines: Sequence[bytes]) -> None:
        """Append encoded records at once: a reader sees them in this order, and none from another writer between them."""

    def encode(self, record: LogRecord) -> bytes:
        """A record as `append` takes it: a line of JSON. A long reason is cut.

        Raises:
            TypeError: it carries a tensor, whose path is named, or anything else that is no plain data.
            UserError: it is longer than readers accept.
        """
        reason = record.reason and record.reason[:MAX_REASON]
        try:
            tokens = {"num_tokens": record.num_tokens} if record.kind == "skip" else {}
            line = orjson.dumps({"kind": record.kind, "seq": record.seq, "ref": record.ref, "reason": reason, **tokens})
        except TypeError as error:
            assert_no_tensors(record.ref, "record.ref")
            raise TypeError(
                f"the record of seq {record.seq} cannot be logged ({error}): records hold plain data"
            ) from error
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

        Raises UserError for a record that is malformed, of another run or another schema; for the details of a ref, when it
        is asked for.
        """

    @abstractmethod
    def rewind(self) -> None:
        """Read from the start again."""

    @abstractmethod
    def trim(self, seq: int) -> None:
        """Drop what this reader has read and what only concerns seqs below `seq`, in so far as that is cheap."""

    def close(self, total: int) -> None:
        """Publish that no seq from `total` on will follow."""
        self.publish([LogRecord(kind="end", seq=total)])

    @abstractmethod
    def _read(self, what: Literal["card", "nonce", "date"]) -> bytes | None:
        """What was written once; None before that."""

    @abstractmethod
    def _write_once(self, what: Literal["card", "nonce", "date"], content: bytes) -> None:
        """Write it unless it exists: the first of several writers wins."""

    def _parse(self, line: bytes, place: str) -> LogRecord:
        """The record of a line. Raises UserError, with the place of the line, for one that no writer of this run wrote."""
        if self._run_id is None:
            self.card()
        try:
            return record_from_json(orjson.loads(line), self._run_id, lambda: _read_ref(line, place))
        except ValueError as error:  # UserError is one
            raise damaged(place, error) from error

    def wait_for_card(self, timeout_s: float, who: str) -> dict[str, Any]:
        """The card, once somebody announced it. Raises PeerTimeoutError naming `who`."""
        wait = Wait(f"{who} to announce the run in {self.name}")
        while (card := self.card()) is None:
            if wait.seconds() > timeout_s:
                raise PeerTimeoutError(
                    f"waited {timeout_s:.0f} s for {who} to announce the run in {self.name}: is it running, with "
                    "this run_name and channel.path?"
                )
            time.sleep(POLL_S[1])
        return card

    def stream(self, idle_timeout_s: float) -> Iterator[LogRecord]:
        """Records as they come, up to `end`. Raises PeerTimeoutError when none came for `idle_timeout_s`."""
        wait, pause = Wait(f"a record from the producers of {self.name}"), POLL_S[0]
        while True:
            records = self.poll()
            for record in records:
                yield record
                if record.kind == "end":
                    return
            if records:
                wait.restart()
                pause = POLL_S[0]
            elif wait.seconds() > idle_timeout_s:
                raise PeerTimeoutError(f"no record came in {idle_timeout_s:.0f} s from the producers of {self.name}")
            else:
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])


def _read_ref(line: bytes, place: str) -> SampleRef:
    try:
        return ref_from_json(orjson.loads(line).get("ref"))
    except UserError as error:
        raise damaged(place, error) from error


def damaged(place: str, error: Exception) -> UserError:
    """The error of a line that no writer wrote."""
    return UserError(f"{place} is damaged: {error}; put back an undamaged copy, or start again under another run_name")


def check_card(found: Mapping[str, Any], mine: Mapping[str, Any], where: str, path: str = "") -> None:
    """Raise UserError naming the first field in which an announced card differs from `mine`."""
    for name in sorted(found.keys() | mine.keys()):
        theirs, ours = found.get(name), mine.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            check_card(theirs, ours, where, f"{path}{name}.")
        elif theirs != ours:
            raise UserError(
                f"{where} belongs to a run with another {path}{name} ({str(theirs)[:60]}, here {str(ours)[:60]}): give all "
                "processes of a run the same settings, or choose another run_name"
            )
