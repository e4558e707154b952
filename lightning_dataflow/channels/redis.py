"""A channel in Redis: any number of machines, no folder that they share."""

import json
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from lightning_dataflow.channels.base import MAX_LINE_BYTES, StreamingRefChannel, check_card
from lightning_dataflow.channels.heads import (
    KINDS,
    NUMBER,
    SEQ,
    Heads,
    RecordHead,
    first_damaged,
    heads_in,
    rows_of,
)
from lightning_dataflow.channels.redis_records import HEAD_BYTES, pack, split, unpack
from lightning_dataflow.channels.redis_scripts import ALLOW_OOM, change_script
from lightning_dataflow.channels.redis_server import RedisServer
from lightning_dataflow.contracts import SCHEMA_VERSION, LogRecord, UserError, assert_no_tensors
from lightning_dataflow.contracts.log import record_from_json

INDEX_ENTRIES = 64
"""Appends whose heads are asked for at a time."""
READ_BYTES = 8 << 20
"""Lines that are asked for at a time."""
NONCE_BITS = 48


class RedisChannel(StreamingRefChannel):
    """A stream, `index`, has an entry for the heads of each append, and a hash, `lines`, fields for their lines.

    The id of an entry is `number-nonce`, of its first record. Trimming drops entries and their lines.

    Raises:
        UserError: the run's card is damaged or of another schema.
    """

    def __init__(self, server: RedisServer):
        self.server = server
        self.name = f"{server.name}, run {server.run_id}"
        self._append, self._trim = change_script(), change_script(flags=ALLOW_OOM)
        self._run_id: str | None = None
        self._position = (0, 0)  # of the last entry of the index that was read
        self._last_number = 0
        self._rows = rows_of([])  # read, not handed out
        self._read: deque[tuple[int, int]] = deque()  # by entry of the index: the number after it, its highest seq
        self._connections = server.num_connections
        self.card()

    def announce(self, card: Mapping[str, Any]) -> None:
        """See StreamingRefChannel."""
        assert_no_tensors(card, "card")
        plain = json.loads(json.dumps({**card, "schema_version": SCHEMA_VERSION}))
        self.server.ask("SET", self.server.key("card"), json.dumps(plain), "NX")
        check_card(json.loads(self.server.ask("GET", self.server.key("card")) or "{}"), plain, self.name)

    def card(self) -> dict[str, Any] | None:
        """See StreamingRefChannel."""
        text = self.server.ask("GET", self.server.key("card"))
        if text is None:
            return None
        try:
            card = json.loads(text)
            version, self._run_id = card.pop("schema_version"), card["run_id"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the card of {self.name} is damaged ({error!r}): start again under another run_name, or remove the run "
                "with lightning-dataflow clean"
            ) from error
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{self.name} has schema version {version}, this release reads {SCHEMA_VERSION}: start the run again under "
                "another run_name"
            )
        return card

    def encode(self, record: LogRecord) -> bytes:
        """See StreamingRefChannel."""
        return pack(record, super().encode(record).removesuffix(b"\n"))

    def append(self, lines: Sequence[bytes]) -> None:
        """See StreamingRefChannel."""
        if lines:
            heads, chunks = split(lines)
            self.server.change(self._append, "append", new_nonce(), heads, listed=chunks)

    def poll(self, max_records: int = 1024) -> list[LogRecord]:
        """See StreamingRefChannel."""
        return [record for record in self._load(heads_in(self.poll_heads(max_records).rows)) if record is not None]

    def poll_heads(self, max_records: int = 1024) -> Heads:
        """See StreamingRefChannel."""
        while len(self._rows) < max_records and self._fill():
            pass
        rows, self._rows = self._rows[:max_records], self._rows[max_records:]
        return Heads(rows)

    def load(self, rows: np.ndarray) -> list[LogRecord]:
        """See StreamingRefChannel. Raises UserError where one was dropped before it was read."""
        heads = heads_in(rows)
        records = self._load(heads)
        for head, record in zip(heads, records, strict=True):
            if record is None:
                raise UserError(
                    f"record {head.number} of {self.name} (seq {head.seq}) was dropped before it was read: do two trainers "
                    "share this run_name?"
                )
        return [record for record in records if record is not None]

    def rewind(self) -> None:
        """See StreamingRefChannel."""
        self._position, self._last_number = (0, 0), 0
        self._rows = rows_of([])
        self._read.clear()

    def trim(self, seq: int) -> None:
        """See StreamingRefChannel. The last entry that was read stays: by it a server that lost some is found out."""
        handed_out = int(self._rows[0, NUMBER]) if len(self._rows) else self._last_number
        following = None
        while len(self._read) > 1 and self._read[0][1] < seq and self._read[0][0] <= handed_out:
            following, _ = self._read.popleft()
        if following is not None:
            self.server.change(self._trim, "trim", following)

    def _fill(self) -> bool:
        """Read more of the index; False when there is no more yet."""
        command = ("XRANGE", self.server.key("index"), f"({_id(self._position)}", "+", "COUNT", INDEX_ENTRIES)
        entries = self.server.ask(*command)
        while self._connections != self.server.num_connections:
            self._check_position()
            entries = self.server.ask(*command)
        if not entries:
            return False
        positions, texts = [_position(name) for name, _ in entries], [fields[1] for _, fields in entries]
        for (first, _), text in zip(positions, texts, strict=True):
            if not text or len(text) % HEAD_BYTES:
                raise self._damaged(first, UserError(f"{len(text)} bytes of heads are no whole number of them"))
        rows = unpack([(first, text) for (first, _), text in zip(positions, texts, strict=True)])
        if (index := first_damaged(rows)) is not None:
            (head,) = heads_in(rows[index : index + 1])
            raise self._damaged(head.number, UserError(f"it has kind {head.kind} and seq {head.seq}"))
        counts = [len(text) // HEAD_BYTES for text in texts]
        highest = np.maximum.reduceat(rows[:, SEQ], np.cumsum([0, *counts[:-1]])).tolist()
        self._read.extend((first + size, seq) for (first, _), size, seq in zip(positions, counts, highest, strict=True))
        self._rows = np.concatenate([self._rows, rows]) if len(self._rows) else rows
        self._position, self._last_number = positions[-1], self._read[-1][0]
        return True

    def _check_position(self) -> None:
        """After a new connection, which may lead to a server that does not know what was read from the one before."""
        connections, key, mine = self.server.num_connections, self.server.key("index"), _id(self._position)
        if self._position != (0, 0) and not self.server.ask("XRANGE", key, mine, mine):
            oldest = self.server.ask("XRANGE", key, "-", "+", "COUNT", 1)
            if not oldest or _position(oldest[0][0]) < self._position:
                raise self.server.lost(f"record {self._position[0]} of run {self.server.run_id}, which was read")
        self._connections = connections

    def _load(self, heads: Sequence[RecordHead]) -> list[LogRecord | None]:
        """None for those that were dropped."""
        chunks: dict[int, bytes | None] = {}
        for places in _batches(heads):
            chunks.update(zip(places, self.server.ask("HMGET", self.server.key("lines"), *places), strict=True))
        return [None if (chunk := chunks[head.place]) is None else self._parse(head, chunk) for head in heads]

    def _parse(self, head: RecordHead, chunk: bytes) -> LogRecord:
        line = chunk[head.offset : head.offset + head.size]
        try:
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"it has over {MAX_LINE_BYTES} bytes")
            record = record_from_json(orjson.loads(line))
        except ValueError as error:  # UserError is one
            raise self._damaged(head.number, error) from error
        if record.seq != head.seq or record.kind != KINDS[head.kind]:
            raise self._damaged(head.number, UserError(f"it is the {record.kind} of seq {record.seq}"))
        if (ref := record.ref) is not None:
            origin = ref.origin
            told = (ref.num_bytes, origin.num_tokens, origin.attempt)
            if told != head[2:5]:
                raise self._damaged(head.number, UserError(f"its head tells {told}"))
            if origin.run_id != self._known_run_id():
                raise UserError(
                    f"{self.name} holds references of run {origin.run_id}, its card is of run {self._run_id}: two runs "
                    "were mixed, start again under another run_name"
                )
        return record

    def _damaged(self, number: int, error: Exception) -> UserError:
        return UserError(f"{self.name} is damaged in record {number}: {error}; start again under another run_name")

    def _known_run_id(self) -> str | None:
        if self._run_id is None:
            self.card()
        return self._run_id


def new_nonce() -> int:
    """For the ids of one append."""
    return secrets.randbits(NONCE_BITS)


def _id(position: tuple[int, int]) -> str:
    return f"{position[0]}-{position[1]}"


def _position(name: bytes) -> tuple[int, int]:
    number, _, nonce = name.decode().partition("-")
    return int(number), int(nonce)


def _batches(heads: Sequence[RecordHead]) -> Iterator[list[int]]:
    """Places of chunks that are asked for at a time."""
    places: dict[int, None] = {}
    size = 0
    for head in heads:
        places[head.place] = None
        size += head.size
        if size > READ_BYTES:
            yield list(places)
            places, size = {}, 0
    if places:
        yield list(places)
