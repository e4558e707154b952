"""A channel in a folder: one machine, or a mount that several machines share."""

import fcntl
import itertools
import json
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import SCHEMA_VERSION, LogRecord, PeerTimeoutError, UserError, assert_no_tensors
from lightning_dataflow.contracts.log import record_from_json
from lightning_dataflow.control.local.lines import add_crc, check_crc
from lightning_dataflow.control.log import MAX_LINE_BYTES, StreamingRefChannel, check_card

CARD = "run.json"
NONCE = "nonce"
SEGMENT_BYTES = 8 << 20
CHUNK_BYTES = 1 << 20
LOCK_TIMEOUT_S = 30.0
LOCK_PAUSE_S = 0.0001
"""An append takes about as long."""


class FileChannel(StreamingRefChannel):
    """JSON lines in segments `log-00000000.jsonl`, `log-00000001.jsonl`, …; trimming removes whole segments.

    Appends are single writes under a file lock. A writer that was killed leaves at most one torn line: readers wait at it,
    the next writer ends it, and then readers skip and count it.

    Args:
        folder: made if missing.
        segment_bytes: a segment that has grown to this size is followed by the next.

    Raises:
        UserError: the folder cannot be written, or its card is damaged or of another schema.
    """

    def __init__(self, folder: str | Path, *, segment_bytes: int = SEGMENT_BYTES):
        self.folder = Path(folder)
        self.name = str(self.folder)
        self.segment_bytes = segment_bytes
        self.num_torn = 0
        self._numbers = itertools.count(1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another channel.path") from error
        self._lock = threading.Lock()
        self._run_id: str | None = None
        self._segment = -1  # of the reader; below the first one before it has read anything
        self._offset = 0
        self._partial = b""
        self._lines: deque[tuple[int, bytes]] = deque()  # complete ones of this segment, with where they start
        self._highest: dict[int, int] = {}  # highest seq of every segment that this reader has read from
        self.card()

    def announce(self, card: Mapping[str, Any]) -> None:
        """See StreamingRefChannel."""
        assert_no_tensors(card, "card")
        plain = json.loads(json.dumps({**card, "schema_version": SCHEMA_VERSION}))
        self._write_once(CARD, json.dumps(plain))
        found = json.loads((self.folder / CARD).read_text())
        check_card(found, plain, self.name)

    def card(self) -> dict[str, Any] | None:
        """See StreamingRefChannel."""
        try:
            card = json.loads((self.folder / CARD).read_text())
            version, self._run_id = card.pop("schema_version"), card["run_id"]
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / CARD} is damaged ({error!r}): start again under another run_name") from error
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{self.folder} has schema version {version}, this release reads {SCHEMA_VERSION}: start the run again "
                "under another run_name"
            )
        return card

    def nonce(self) -> str:
        """See StreamingRefChannel."""
        if not (self.folder / NONCE).exists():
            self._write_once(NONCE, secrets.token_hex(8))
        return (self.folder / NONCE).read_text()

    def append(self, lines: Sequence[bytes]) -> None:
        """See StreamingRefChannel."""
        data = b"".join(add_crc(line) for line in lines)
        with self._exclusive():
            segment = os.open(self._last_segment(), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(segment).st_size
                if size and os.pread(segment, 1, size - 1) != b"\n":
                    data = b"\n" + data  # end what a killed writer left
                while data:
                    data = data[os.write(segment, data) :]
            finally:
                os.close(segment)

    def poll(self, max_records: int = 1024) -> list[LogRecord]:
        """See StreamingRefChannel."""
        records: list[LogRecord] = []
        while len(records) < max_records and (self._lines or self._fill()):
            record = self._parse(*self._lines.popleft())
            if record is not None:
                records.append(record)
                self._highest[self._segment] = max(self._highest.get(self._segment, -1), record.seq)
        return records

    def rewind(self) -> None:
        """See StreamingRefChannel."""
        self._segment, self._offset, self._partial = -1, 0, b""
        self._lines.clear()
        self._highest.clear()

    def trim(self, seq: int) -> None:
        """See StreamingRefChannel. Removes segments of which everything is read and below `seq`."""
        for segment in self._segments():
            if segment >= self._segment or self._highest.get(segment, -1) >= seq:
                return
            self._path(segment).unlink(missing_ok=True)
            self._highest.pop(segment, None)

    def _write_once(self, name: str, text: str) -> None:
        """Write a file of the folder unless it exists: the first of several writers wins."""
        temporary = self.folder / f".{name}-{secrets.token_hex(8)}"
        temporary.write_text(text)
        try:
            with suppress(FileExistsError):
                os.link(temporary, self.folder / name)
        finally:
            temporary.unlink()

    def _fill(self) -> bool:
        """Split more of the log into lines; False when it has no complete ones yet."""
        while chunk := self._read():
            start = self._offset - len(chunk) - len(self._partial)
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            if len(self._partial) > MAX_LINE_BYTES:
                path = self._path(self._segment)
                raise UserError(f"{path} has a line of over {MAX_LINE_BYTES} bytes: it is no log of references")
            for line in lines:
                self._lines.append((start, line))
                start += len(line) + 1
            if lines:
                return True
        return False

    def _read(self) -> bytes:
        """More bytes of the log; b"" when there are none yet."""
        while True:
            following = min((one for one in self._segments() if one > self._segment), default=None)
            chunk = self._read_segment()  # after looking for the next one: nothing is appended once that is there
            if chunk or following is None:
                return chunk
            self.num_torn += bool(self._partial)
            self._segment, self._offset, self._partial = following, 0, b""

    def _read_segment(self) -> bytes:
        try:
            file = os.open(self._path(self._segment), os.O_RDONLY)
        except FileNotFoundError:
            return b""
        try:
            chunk = os.pread(file, CHUNK_BYTES, self._offset)
        finally:
            os.close(file)
        self._offset += len(chunk)
        return chunk

    def _parse(self, start: int, line: bytes) -> LogRecord | None:
        if not line:
            return None
        try:
            data = check_crc(line)
            if data is None:
                self.num_torn += 1
                return None
            record = record_from_json(data)
        except UserError as error:
            raise UserError(
                f"{self._path(self._segment)} is damaged in the line at byte {start}: {error}; put back an undamaged "
                "copy, or start again under another run_name"
            ) from error
        if record.ref is not None and record.ref.origin.run_id != self._known_run_id():
            raise UserError(
                f"{self._path(self._segment)} holds references of run {record.ref.origin.run_id}, {CARD} is of run "
                f"{self._run_id}: files of two runs were mixed, start again under another run_name"
            )
        return record

    def _known_run_id(self) -> str | None:
        if self._run_id is None:
            self.card()
        return self._run_id

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            self._lock_patiently()
            try:
                yield
            finally:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _lock_patiently(self) -> None:
        """The kernel gives the lock of a process that was killed to the next; that of a stopped one is waited for."""
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                return fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise PeerTimeoutError(
                        f"could not append to the log in {self.folder} within {LOCK_TIMEOUT_S:.0f} s: is a process of the "
                        "run stopped inside a write? Continue or end it"
                    ) from error
            time.sleep(LOCK_PAUSE_S)

    def _last_segment(self) -> Path:
        last = max(self._segments(), default=0)
        path = self._path(last)
        full = path.exists() and path.stat().st_size >= self.segment_bytes
        return self._path(last + 1) if full else path

    def _segments(self) -> list[int]:
        names = [entry.name for entry in os.scandir(self.folder)]
        return sorted(int(name[4:12]) for name in names if name.startswith("log-") and name.endswith(".jsonl"))

    def _path(self, segment: int) -> Path:
        return self.folder / f"log-{segment:08d}.jsonl"
