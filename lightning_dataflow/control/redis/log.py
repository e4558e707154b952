"""A channel in Redis: any number of machines, no folder that they share."""

import json
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from lightning_dataflow.contracts import SCHEMA_VERSION, LogRecord, UserError, assert_no_tensors
from lightning_dataflow.contracts.log import record_from_json
from lightning_dataflow.control.heads import (
    KINDS,
    MAX_NUMBER,
    NUMBER,
    SEQ,
    Heads,
    RecordHead,
    first_damaged,
    heads_in,
    rows_of,
)
from lightning_dataflow.control.log import StreamingRefChannel, check_card
from lightning_dataflow.control.redis.records import CHUNK, HEAD_BYTES, pack, split, unpack
from lightning_dataflow.control.redis.scripts import ALLOW_OOM, change_script
from lightning_dataflow.control.redis.server import RedisServer

INDEX_ENTRIES = 64
"""Appends whose heads are asked for at a time."""
READ_BYTES = 8 << 20
"""Lines that are asked for at a time, about."""
MAX_READ = 1 << 14
"""Entries of the index that a reader remembers one by one, to trim them."""
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
        self._read = _Read()
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

    def nonce(self) -> str:
        """See StreamingRefChannel."""
        while (found := self.server.ask("GET", self.server.key("nonce"))) is None:
            self.server.ask("SET", self.server.key("nonce"), secrets.token_hex(8), "NX")
        return found.decode()

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
        self._read = _Read()

    def trim(self, seq: int) -> None:
        """See StreamingRefChannel. The last entry that was read stays: by it a server that lost some is found out."""
        rows = self._rows  # another thread reads on
        handed_out = int(rows[0, NUMBER]) if len(rows) else self._last_number
        following = self._read.pop_below(seq, handed_out)
        if following is not None:
            while self.server.change(self._trim, "trim", following):
                pass

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
        following = self._last_number
        for (first, _), text in zip(positions, texts, strict=True):
            if not text or len(text) % HEAD_BYTES:
                raise self._damaged(first, UserError(f"{len(text)} bytes of heads are no whole number of them"))
            if not max(1, following) <= first < MAX_NUMBER - len(text):
                raise self._damaged(first, UserError(f"its number does not follow {following - 1}"))
            following = first + len(text) // HEAD_BYTES
        rows = unpack([(first, text) for (first, _), text in zip(positions, texts, strict=True)])
        if (index := first_damaged(rows)) is not None:
            (head,) = heads_in(rows[index : index + 1])
            raise self._damaged(head.number, UserError(f"no record has the {head}"))
        counts = [len(text) // HEAD_BYTES for text in texts]
        highest = np.maximum.reduceat(rows[:, SEQ], np.cumsum([0, *counts[:-1]])).tolist()
        for (first, _), size, seq in zip(positions, counts, highest, strict=True):
            self._read.add(first + size, seq)
        self._rows = np.concatenate([self._rows, rows]) if len(self._rows) else rows
        self._position, self._last_number = positions[-1], following
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
        records: list[LogRecord | None] = []
        for some in _batches(heads):
            places = list(dict.fromkeys(head.place for head in some))
            chunks = dict(zip(places, self.server.ask("HMGET", self.server.key("lines"), *places), strict=True))
            for head in some:
                chunk = chunks[head.place]
                records.append(None if chunk is None else self._parse(head, chunk))
        return records

    def _parse(self, head: RecordHead, chunk: bytes) -> LogRecord:
        line = chunk[head.offset : head.offset + head.size]
        try:
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


def _batches(heads: Sequence[RecordHead]) -> Iterator[Sequence[RecordHead]]:
    """Heads whose chunks are asked for at a time."""
    first, size, place = 0, 0, None
    for index, head in enumerate(heads):
        if head.place != place:
            place, size = head.place, size + CHUNK * head.size
            if size > READ_BYTES and index > first:
                yield heads[first:index]
                first, size = index, CHUNK * head.size
    if heads:
        yield heads[first:]


class _Read:
    """The entries of the index that were read, to trim them: the number after each, and its highest seq.

    Of a long log, which somebody else trims or nobody, several that follow each other count as one.
    """

    def __init__(self) -> None:
        self._spans: deque[tuple[int, int]] = deque()
        self._most_in_one, self._in_last = 1, 0

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, after: int, highest: int) -> None:
        """The next entry."""
        if self._spans and self._in_last < self._most_in_one:
            self._spans[-1] = after, max(self._spans[-1][1], highest)
            self._in_last += 1
            return
        self._spans.append((after, highest))
        self._in_last = 1
        if len(self._spans) > MAX_READ:
            spans = [*self._spans]
            pairs = zip(spans[::2], spans[1::2], strict=False)
            self._spans = deque((later[0], max(one[1], later[1])) for one, later in pairs)
            self._spans.extend(spans[len(spans) // 2 * 2 :])
            self._most_in_one *= 2

    def pop_below(self, seq: int, number: int) -> int | None:
        """Forget entries that are below `seq` and end by `number`, all but the last; returns the number after them."""
        following = None
        while len(self._spans) > 1 and self._spans[0][1] < seq and self._spans[0][0] <= number:
            following, _ = self._spans.popleft()
        return following
