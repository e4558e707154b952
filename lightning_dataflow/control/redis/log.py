"""A channel in Redis: any number of machines, no folder that they share."""

from collections.abc import Sequence
from typing import Any

from lightning_dataflow.contracts import LogRecord, UserError
from lightning_dataflow.control.log import MAX_LINE_BYTES, StreamingRefChannel, damaged
from lightning_dataflow.control.redis.scripts import ALWAYS, GROWING
from lightning_dataflow.control.redis.server import RedisServer

READ_ENTRIES = 256
START = b"0-0"


class RedisChannel(StreamingRefChannel):
    """A stream with an entry for each record.

    Raises:
        UserError: the run's card is damaged or of another release.
    """

    def __init__(self, server: RedisServer):
        self.server = server
        self.name = f"{server.name}, run {server.run_id}"
        self._key = server.key("log")
        self._position = START  # the id of the last entry that was read
        self.card()

    def append(self, lines: Sequence[bytes]) -> None:
        if lines:
            self.server.change(GROWING, "append", [line.decode() for line in lines])

    def poll(self, max_records: int = 1024) -> list[LogRecord]:
        records: list[LogRecord] = []
        while len(records) < max_records and (entries := self._entries(min(READ_ENTRIES, max_records - len(records)))):
            for name, fields in entries:
                place = f"{self.name}, record {_number(name)},"
                if len(fields) != 2 or len(fields[1]) > MAX_LINE_BYTES:
                    raise damaged(place, UserError(f"it is no line of at most {MAX_LINE_BYTES} bytes"))
                records.append(self._parse(fields[1], place))
                self._position = name
        return records

    def rewind(self) -> None:
        self._position = START

    def trim(self, seq: int) -> None:
        """The last entry that was read stays: a server that no longer has it has lost some."""
        while self._position != START and self.server.change(ALWAYS, "trim", seq, self._position.decode()):
            pass

    def _read(self, what: str) -> bytes | None:
        content: bytes | None = self.server.read("GET", self.server.key(what))
        return content

    def _write_once(self, what: str, content: bytes) -> None:
        self.server.ask("SET", self.server.key(what), content, "NX")

    def _entries(self, number: int) -> list[Any]:
        """The next entries, as (id, fields). Reads the last one again, to notice a server that lost it."""
        # Not `read`: every rank reads all entries, and the server would need ten times as long for each. COUNT bounds how
        # many come at once, and `poll` refuses one that is too long.
        if self._position == START:
            return self.server.ask("XRANGE", self._key, "-", "+", "COUNT", number)
        entries = self.server.ask("XRANGE", self._key, self._position, "+", "COUNT", number + 1)
        if entries and entries[0][0] == self._position:
            return entries[1:]
        oldest = self.server.ask("XRANGE", self._key, "-", "+", "COUNT", 1)
        if not oldest or _number(oldest[0][0]) <= _number(self._position):
            raise self.server.lost(f"record {_number(self._position)} of run {self.server.run_id}, which was read")
        return entries[:number]


def _number(name: bytes) -> int:
    return int(name.partition(b"-")[0])
