"""One rank's view of the log: whole windows, in seq order, whatever the order in which samples were published."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from lightning_dataflow.contracts import LogRecord, PeerFailedError, PeerTimeoutError, SampleRef, UserError
from lightning_dataflow.contracts.log import MAX_SEQ, replaces
from lightning_dataflow.contracts.waiting import Wait
from lightning_dataflow.control import ControlPlane
from lightning_dataflow.control.heartbeat import producer_failures
from lightning_dataflow.control.log import POLL_S
from lightning_dataflow.data.source import SKIP_REASON, RefWindow

CHECK_PEERS_S = 0.5


class QueueCancelledError(Exception):
    """The fit ended while a window was waited for."""


class StreamingRefQueue:
    """Reads the log and hands out windows that are complete.

    Every rank reads the whole log and sees the same windows, so ranks need no dispatcher and never differ in their number
    of batches. Which of several records of a seq counts is `contracts.log.replaces`; others are unwanted.
    Memory holds what is in flight: a window is kept until it is acknowledged, so that a later record of it is noticed.

    One thread reads; `ack`, `cancel` and the counts may be used from another.

    Args:
        start: the first seq of interest; older ones are unwanted.
        skip_ids: source ids of samples that are not trained: they keep their places with zero loss weight.
        idle_timeout_s: wait this long for a record at most.
        pump: where this process captures by itself, called instead of waiting; returns whether it captured something.
    """

    def __init__(
        self,
        plane: ControlPlane,
        *,
        start: int = 0,
        skip_ids: Collection[str] = (),
        idle_timeout_s: float = 600.0,
        pump: Callable[[], bool] | None = None,
    ):
        self._plane = plane
        self._start = start
        self._skip_ids = frozenset(skip_ids)
        self._idle_timeout_s = idle_timeout_s
        self._pump = pump
        self._records: dict[int, LogRecord] = {}  # those that count, by seq from `start` on
        self._first: dict[int, LogRecord] = {}  # where another counts now: its sizes do, so that all ranks count alike
        self._handed_out: set[int] = set()  # seqs whose current record was
        self._lost: set[int] = set()  # seqs whose records are void: the next is waited for
        self._unwanted: list[LogRecord] = []
        self._end: int | None = None
        self._lock = threading.RLock()
        self._cancelled = threading.Event()
        self.skipped: dict[int, str] = {}
        self.recaptured: list[int] = []
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
        self._lost.update(seqs)

    def num_tokens(self, seq: int) -> int:
        """Length of the sample at `seq`, 0 where its capture failed, once it is there. Raises as `get` does."""
        self._wait([seq])
        return self._num_tokens([seq])

    def get(self, seqs: Sequence[int], share: Sequence[int]) -> RefWindow:
        """The window `seqs`, and of it the refs of `share`, once it is complete.

        Raises:
            PeerTimeoutError: no record came for `idle_timeout_s`; names who was waited for.
            PeerFailedError: the last producer failed, or another part ended the run.
            UserError: the log has ended before this window.
        """
        self._wait(seqs)
        with self._lock:
            self._handed_out.update(seqs)
        return RefWindow(refs=[self._ref(seq) for seq in share], num_tokens=self._num_tokens(seqs))

    def num_bytes(self, seqs: range) -> int:
        """Payload of a complete window, the same on every rank."""
        return sum(record.num_bytes for record in self._first_records(seqs))

    def ack(self, next_seq: int) -> list[LogRecord]:
        """Everything before `next_seq` has been trained. Returns records of it whose features nobody reads, to be freed."""
        with self._lock:
            for seq in range(self._start, next_seq):
                record = self._records.pop(seq, None)
                if record is not None and seq not in self._handed_out:  # it came after its window was handed out
                    self._discard(record)
                self._first.pop(seq, None)
                self._handed_out.discard(seq)
            self._start = max(self._start, next_seq)
            return self.take_unwanted(next_seq)

    def fail(self, seq: int, ref: SampleRef, reason: str, *, retryable: bool = True) -> SampleRef | None:
        """The features of `ref` cannot be read: blocks until they are captured again or given up.

        Not retryable, or after the bounded attempts, the sample is published as skipped.
        """
        if self._ref(seq) == ref:  # else it was captured again, or given up, meanwhile
            if retryable and self._plane.ledger.want(seq, ref.generation):
                self._lost.add(seq)
                self._wait([seq])
            else:
                self._plane.skip([seq], reason)
                self._take_in([LogRecord(kind="skip", seq=seq, reason=reason)])
        with self._lock:
            self._handed_out.add(seq)
        return self._ref(seq)

    def unread(self) -> list[SampleRef]:
        """Refs that were not acknowledged."""
        with self._lock:
            records = [*self._records.values(), *self.take_unwanted()]
        return [record.ref for record in records if record.ref is not None]

    def take_unwanted(self, below: int = MAX_SEQ + 1) -> list[LogRecord]:
        """Records so far with features that do not count, of seqs below that. Only who frees them needs their refs."""
        with self._lock:
            taken = [record for record in self._unwanted if record.seq < below]
            self._unwanted = [record for record in self._unwanted if record.seq >= below]
            return taken

    def cancel(self) -> None:
        """Make a call that blocks in another thread raise QueueCancelledError."""
        self._cancelled.set()

    def _ref(self, seq: int) -> SampleRef | None:
        ref = self._records[seq].ref
        return None if ref is None or ref.origin.source_id in self._skip_ids else ref

    def _first_records(self, seqs: Sequence[int]) -> list[LogRecord]:
        """Of a complete window."""
        with self._lock:
            return [self._first.get(seq, self._records[seq]) for seq in seqs]

    def _num_tokens(self, seqs: Sequence[int]) -> int:
        return sum(record.num_tokens for record in self._first_records(seqs))

    def _take_in(self, records: Iterable[LogRecord]) -> None:
        with self._lock:
            for record in records:
                if record.kind == "begin":
                    self._end = None
                elif record.kind == "end":
                    self._end = record.seq
                else:
                    self._take(record)

    def _take(self, record: LogRecord) -> None:
        seq = record.seq
        known = self._records.get(seq)
        if seq < self._start or (known is not None and not replaces(record, known)):
            self._discard(record)
            return
        if known is not None:
            self._discard(known)
            self._first.setdefault(seq, known)
            if record.has_ref:
                self.recaptured.append(seq)
        self._records[seq] = record
        self._handed_out.discard(seq)
        self._lost.discard(seq)
        if not record.has_ref:
            self.skipped[seq] = str(record.reason)
        elif self._skip_ids and record.ref is not None and record.ref.origin.source_id in self._skip_ids:
            self.skipped[seq] = SKIP_REASON
            self._discard(record)

    def _discard(self, record: LogRecord) -> None:
        if record.has_ref:
            self._unwanted.append(record)

    def _wait(self, seqs: Sequence[int]) -> None:
        """Until each of `seqs` has its record."""
        has_waited, last_check, pause = False, 0.0, POLL_S[0]
        wait = Wait(lambda: f"{self.waiting_for} from {self._producers()}")
        while True:
            records = self._plane.log.poll()
            self._take_in(records)
            num_missing = self._num_missing(seqs)
            if num_missing == 0:
                self.waiting_for = ""
                return
            if self._cancelled.is_set():
                raise QueueCancelledError
            now = time.monotonic()
            if records:
                wait.restart()
            elif now - last_check > CHECK_PEERS_S:
                last_check = now
                self.waiting_for = f"{num_missing} of the {len(seqs)} samples of the window at seq {min(seqs)}"
                self._check_peers(seqs, wait.seconds())
            if not records and not has_waited:
                has_waited = True
                self._plane.ledger.count_wait()
            if self._pump is None or not (records or self._pump()):
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])

    def _num_missing(self, seqs: Sequence[int]) -> int:
        with self._lock:
            return sum(seq not in self._records or seq in self._lost for seq in seqs)

    def _check_peers(self, seqs: Sequence[int], idle_s: float) -> None:
        if failures := producer_failures(self._plane.ledger):
            raise PeerFailedError("; ".join(failures))
        if (status := self._plane.ledger.finished()) is not None:
            raise PeerFailedError(f"the run was ended ({status}) while this process waited for {self.waiting_for}")
        if self._end is not None and self._end <= max(seqs):
            raise UserError(
                f"{self._plane.log.name} ends at seq {self._end}, the next window needs seqs up to {max(seqs) + 1}: lower "
                "trainer.max_steps, or start producers with the settings of this trainer"
            )
        if idle_s > self._idle_timeout_s:
            raise PeerTimeoutError(
                f"no sample came for {idle_s:.0f} s; waiting for {self.waiting_for} from {self._producers()}"
            )

    def _producers(self) -> str:
        parts = [part for part in self._plane.ledger.parts() if part["name"].startswith("producer")]
        who = (f"{part['name']} on {part['host']} ({part['state']}, seen {part['seen_s_ago']:.0f} s ago)" for part in parts)
        return ", ".join(who) or "a producer, none has started"
