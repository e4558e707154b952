"""A channel in a folder: one machine, or a mount that several machines share."""

import fcntl
import logging
import os
import re
import secrets
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from lightning_dataflow.contracts import LogRecord, UserError
from lightning_dataflow.contracts.foreign import read_bounded
from lightning_dataflow.control.local.waiting import wait_for_others
from lightning_dataflow.control.log import MAX_LINE_BYTES, StreamingRefChannel, damaged

log = logging.getLogger(__name__)

FILES = {"card": "run.json", "nonce": "nonce", "date": "date"}
SEGMENT_BYTES = 8 << 20
SEGMENT = re.compile(r"log-(\d{8})\.jsonl")
FILE_MODE = 0o644
CHUNK_BYTES = 2 * MAX_LINE_BYTES
TORN = b" torn"
"""Ends what a killed writer left of a line. No whole line ends like this."""
LOST = bytes(512)
"""A file has such sectors after a power cut where data had not reached the disk. No line holds a zero."""
CHECKSUM = b',"crc32":'


class FileChannel(StreamingRefChannel):
    """JSON lines in segments `log-00000000.jsonl`, `log-00000001.jsonl`, …; trimming removes whole segments.

    Appends are made under a file lock. A writer that was killed leaves at most one torn line: readers wait at it, the next
    writer marks it, and then readers skip it and log that they did. Lines that a power cut turned into zeros are torn, too.
    A checksum in each line tells of other damage.

    Args:
        folder: made if missing.
        segment_bytes: a segment that has grown to this size is followed by the next.

    Raises:
        UserError: the folder cannot be written, or its card is damaged or of another release.
    """

    def __init__(self, folder: str | Path, *, segment_bytes: int = SEGMENT_BYTES):
        self.folder = Path(folder)
        self.name = str(self.folder)
        self.segment_bytes = segment_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, FILE_MODE)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another channel.path") from error
        self._lock = threading.Lock()
        self._highest: dict[int, int] = {}  # highest seq of every segment that this reader has read from
        self._segment, self._offset = -1, 0  # below the first segment
        self._after_zeros = False  # what is left of the line at the offset has lost its beginning
        self.card()

    def append(self, lines: Sequence[bytes]) -> None:
        data = b"".join(add_crc(line) + b"\n" for line in lines)
        with self._exclusive(), open(self._last_segment(), "ab+", opener=_open) as segment:
            if size := segment.tell():
                segment.seek(size - 1)
                if segment.read(1) != b"\n":
                    data = TORN + b"\n" + data
            segment.write(data)

    def poll(self, max_records: int = 1024) -> list[LogRecord]:
        records: list[LogRecord] = []
        while len(records) < max_records:
            # Looked for before the read: nothing is appended to a segment once the next one exists.
            following = min((number for number in self._segments() if number > self._segment), default=None)
            *lines, rest = self._unread().split(b"\n")
            for line in lines[: max_records - len(records)]:
                record = self._record(line)
                self._offset += len(line) + 1
                if record is not None:
                    records.append(record)
                    self._highest[self._segment] = max(self._highest.get(self._segment, -1), record.seq)
            if len(rest) == CHUNK_BYTES and LOST in rest:
                self._offset += CHUNK_BYTES
                self._after_zeros = True
                continue
            if len(rest) == CHUNK_BYTES:
                raise UserError(f"{self._path(self._segment)} has a line of over {MAX_LINE_BYTES} bytes: it is no log")
            if not lines:
                if following is None:
                    break
                if rest:
                    self._skip_torn()
                self._segment, self._offset, self._after_zeros = following, 0, False
        return records

    def rewind(self) -> None:
        self._segment, self._offset, self._after_zeros = -1, 0, False
        self._highest.clear()

    def trim(self, seq: int) -> None:
        for segment in self._segments():
            if segment >= self._segment or self._highest.get(segment, -1) >= seq:
                return
            self._path(segment).unlink(missing_ok=True)
            self._highest.pop(segment, None)

    def _read(self, what: str) -> bytes | None:
        try:
            return read_bounded(self.folder / FILES[what])
        except FileNotFoundError:
            return None

    def _write_once(self, what: str, content: bytes) -> None:
        temporary = self.folder / f".{what}-{secrets.token_hex(8)}"
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # after a power cut the name must not stand for an empty file
        try:
            with suppress(FileExistsError):
                os.link(temporary, self.folder / FILES[what])
        finally:
            temporary.unlink()

    def _unread(self) -> bytes:
        """The next bytes of the segment."""
        try:
            with open(self._path(self._segment), "rb") as segment:
                segment.seek(self._offset)
                return segment.read(CHUNK_BYTES)
        except FileNotFoundError:
            return b""

    def _record(self, line: bytes) -> LogRecord | None:
        """The record of a line; None for a torn one."""
        is_torn = line.endswith(TORN) or LOST in line or self._after_zeros
        self._after_zeros = False
        if is_torn:
            self._skip_torn()
            return None
        place = f"{self._path(self._segment)}, the line at byte {self._offset},"
        try:
            check_crc(line)
        except UserError as error:
            raise damaged(place, error) from error
        return self._parse(line, place)

    def _skip_torn(self) -> None:
        path = self._path(self._segment)
        cause = "its writer was killed inside the write, or the machine lost power"
        log.warning("skipped a torn line in %s at byte %d: %s", path, self._offset, cause)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            # The kernel gives the lock of a process that was killed to the next.
            lock = partial(fcntl.flock, self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                wait_for_others(lock, f"append to the log in {self.folder}")
                yield
            finally:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _last_segment(self) -> Path:
        last = max(self._segments(), default=0)
        path = self._path(last)
        full = path.exists() and path.stat().st_size >= self.segment_bytes
        return self._path(last + 1) if full else path

    def _segments(self) -> list[int]:
        names = [match for entry in os.scandir(self.folder) if (match := SEGMENT.fullmatch(entry.name))]
        return sorted(int(match[1]) for match in names)

    def _path(self, segment: int) -> Path:
        return self.folder / f"log-{segment:08d}.jsonl"


def _open(name: str, flags: int) -> int:
    return os.open(name, flags, FILE_MODE)


def add_crc(line: bytes) -> bytes:
    """Add the checksum to a line, a JSON object, as its last field."""
    return b'%b%b"%08x"}' % (line[:-1], CHECKSUM, zlib.crc32(line))


def check_crc(line: bytes) -> None:
    """Raise UserError for a line, without its newline, whose checksum is missing or wrong: no writer wrote it."""
    content, field, checksum = line.rpartition(CHECKSUM)
    if not field:
        raise UserError("it has no checksum")
    if checksum != b'"%08x"}' % zlib.crc32(content + b"}"):
        raise UserError("its checksum does not match")
