"""One rank's view of the log: whole windows, in seq order, whatever the order in which samples were published."""

import threading
import time
from collections.abc import Callable, Collection, Iterable

from lightning_dataflow.channels.base import POLL_S
from lightning_dataflow.contracts import LogRecord, PeerFailedError, PeerTimeoutError, SampleRef, UserError
from lightning_dataflow.control import ControlPlane
from lightning_dataflow.data.source import RefWindow, WindowEntry

CHECK_PEERS_S = 0.5


class QueueCancelledError(Exception):
    """The fit ended while a window was waited for."""


class StreamingRefQueue:
    """Reads the log and hands out windows that are complete.

    Every rank reads the whole log and sees the same windows, so ranks need no dispatcher and never differ in their number
    of batches. The first ref of a seq counts; a `supersede` replaces it, later duplicates are `unwanted`.

    Args:
        start: the first seq of interest; older ones are dropped.
        skip_ids: sample ids that are not trained: they keep their places with zero loss weight.
        idle_timeout_s: wait this long for a record at most.
        pump: where this process captures by itself, called instead of waiting; returns whether it got further.
        retain: a window can be asked for again.
    """

    def __init__(
        self,
        plane: ControlPlane,
        *,
        start: int = 0,
        skip_ids: Collection[str] = (),
        idle_timeout_s: float = 600.0,
        pump: Callable[[], bool] | None = None,
        retain: bool = False,
    ):
        self._plane = plane
        self._start = start
        self._skip_ids = frozenset(skip_ids)
        self._idle_timeout_s = idle_timeout_s
        self._pump = pump
        self._retain = retain
        self._entries: dict[int, WindowEntry] = {}
        self._num_tokens: dict[int, int] = {}  # by the first record of a seq, so that all ranks count alike
        self._lost: dict[int, str] = {}  # generations that are waited to be superseded
        self._end: int | None = None
        self._cancelled = threading.Event()
        self.unwanted: list[SampleRef] = []
        self.skipped: dict[int, str] = {}
        self.num_recaptured = 0
        self.waiting_for = ""

    def catch_up(self) -> list[LogRecord]:
        """Take in all that the log holds now, and return it."""
        seen: list[LogRecord] = []
        while records := self._plane.log.poll():
            self._take_in(records)
            seen += records
        return seen

    def forget(self, seqs: Iterable[int]) -> None:
        """What was published of these seqs is lost: wait for it to be captured again."""
        for seq in seqs:
            self._entries.pop(seq, None)

    def get(self, seqs: range, share: range) -> RefWindow:
        """The window `seqs`, and of it the refs of `share`, once it is complete.

        Raises:
            PeerTimeoutError: no record came for `idle_timeout_s`; names who was waited for.
            PeerFailedError: another part of the run reported that it failed.
            UserError: the log has ended before this window.
        """
        self._wait(seqs)
        entries = [self._entries[seq] for seq in share]
        num_tokens = sum(self._num_tokens[seq] for seq in seqs)
        if not self._retain:
            for seq in seqs:
                del self._entries[seq], self._num_tokens[seq]
            self._start = max(self._start, seqs.stop)
        return RefWindow(entries=entries, num_tokens=num_tokens)

    def ack(self, next_seq: int, global_step: int) -> None:
        """The optimizer step that used everything before `next_seq` has been applied."""
        self._plane.ledger.ack(next_seq, global_step)

    def fail(self, entry: WindowEntry, reason: str, *, retryable: bool = True) -> WindowEntry:
        """The features of `entry` cannot be read: blocks until they are captured again or given up.

        Not retryable, or after the bounded attempts, the sample is published as skipped.
        """
        assert entry.ref is not None, "a skipped entry has no features to fail"
        known = self._entries.get(entry.seq)
        if known is not None and known != entry:
            return known  # captured again meanwhile
        if retryable and self._plane.ledger.want(entry.seq, entry.ref.generation):
            return self._wait_again(entry.seq, entry.ref.generation)
        self._plane.skip([entry.seq], reason)
        self.skipped[entry.seq] = reason
        return WindowEntry(seq=entry.seq, ref=None)

    def _wait_again(self, seq: int, lost_generation: str) -> WindowEntry:
        self._entries.pop(seq, None)
        before, self._start = self._start, min(self._start, seq)
        self._lost[seq] = lost_generation
        try:
            self._wait(range(seq, seq + 1))
        finally:
            self._start = before
            del self._lost[seq]
        if self._retain:
            return self._entries[seq]
        self._num_tokens.pop(seq)
        return self._entries.pop(seq)

    def unread(self) -> list[SampleRef]:
        """Refs that were never handed out."""
        return [entry.ref for entry in self._entries.values() if entry.ref is not None] + self.unwanted

    def cancel(self) -> None:
        """Make a call that blocks in another thread raise QueueCancelledError."""
        self._cancelled.set()

    def _take_in(self, records: Iterable[LogRecord]) -> None:
        for record in records:
            if record.kind == "begin":
                self._end = None
            elif record.kind == "end":
                self._end = record.seq
            elif record.seq < self._start:
                if record.ref is not None:
                    self.unwanted.append(record.ref)
            else:
                self._take(record)

    def _take(self, record: LogRecord) -> None:
        seq, ref = record.seq, record.ref
        if ref is not None and ref.generation == self._lost.get(seq):
            return
        self._num_tokens.setdefault(seq, 0 if ref is None else ref.num_tokens)
        if record.kind == "ref" and seq in self._entries:
            assert ref is not None
            self.unwanted.append(ref)
            return
        self.num_recaptured += record.kind == "supersede"
        if ref is not None and ref.sample_id in self._skip_ids:
            self.unwanted.append(ref)
            self.skipped[seq] = "skip_ids"
            ref = None
        elif ref is None:
            self.skipped[seq] = str(record.reason)
        self._entries[seq] = WindowEntry(seq=seq, ref=ref)

    def _wait(self, seqs: range) -> None:
        """Until every one of `seqs` has its entry."""
        waited, last_news, last_check, pause = False, time.monotonic(), 0.0, POLL_S[0]
        while True:
            records = self._plane.log.poll()
            self._take_in(records)
            missing = [seq for seq in seqs if seq not in self._entries]
            if not missing:
                self.waiting_for = ""
                return
            now = time.monotonic()
            if records:
                last_news, pause = now, POLL_S[0]
                continue
            if self._cancelled.is_set():
                raise QueueCancelledError
            if now - last_check > CHECK_PEERS_S:
                last_check = now
                self.waiting_for = f"{len(missing)} of the {len(seqs)} samples of the window at seq {seqs.start}"
                self._check_peers(seqs, now - last_news)
            if not waited:
                waited = True
                self._plane.ledger.count_wait()
            if self._pump is None or not self._pump():
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])

    def _check_peers(self, seqs: range, idle_s: float) -> None:
        if failures := self._plane.ledger.failures():
            raise PeerFailedError("; ".join(failures))
        if self._end is not None and self._end < seqs.stop:
            raise UserError(
                f"{self._plane.log.name} ends at seq {self._end}, the next window needs seqs up to {seqs.stop}: lower "
                "trainer.max_steps, or start producers with the settings of this trainer"
            )
        if idle_s > self._idle_timeout_s:
            parts = [part for part in self._plane.ledger.status()["parts"] if part["name"].startswith("producer")]
            who = ", ".join(
                f"{one['name']} on {one['host']} ({one['state']}, seen {one['seen_s_ago']:.0f} s ago)" for one in parts
            )
            raise PeerTimeoutError(
                f"no sample came for {idle_s:.0f} s; waiting for {self.waiting_for} from "
                f"{who or 'a producer, none has started'}"
            )
