"""One rank's view of the log: whole windows, in seq order, whatever the order in which samples were published."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count

import numpy as np

from lightning_dataflow.contracts import LogRecord, PeerFailedError, PeerTimeoutError, SampleRef, UserError
from lightning_dataflow.contracts.log import replaces
from lightning_dataflow.control import ControlPlane
from lightning_dataflow.control.heads import (
    KINDS,
    MAX_NUMBER,
    NUM_BYTES,
    NUM_TOKENS,
    SEQ,
    Heads,
    RecordHead,
    have_refs,
    head_of,
    heads_in,
    rows_of,
)
from lightning_dataflow.control.heartbeat import producer_failures
from lightning_dataflow.control.log import POLL_S
from lightning_dataflow.data.head_table import HeadTable
from lightning_dataflow.data.source import SKIP_REASON, RefWindow, WindowEntry

CHECK_PEERS_S = 0.5


class QueueCancelledError(Exception):
    """The fit ended while a window was waited for."""


class StreamingRefQueue:
    """Reads the log and hands out windows that are complete.

    Every rank reads the whole log and sees the same windows, so ranks need no dispatcher and never differ in their number
    of batches. Which of several records of a seq counts is `contracts.log.replaces`; the refs of others are unwanted.
    Memory holds what is in flight: a window is kept until it is acknowledged, so that a later record of it is noticed.

    What is read of most records is their heads; the refs are loaded that are handed out, or that are to be freed.

    One thread reads; `ack`, `cancel` and the counts may be used from another.

    Args:
        start: the first seq of interest; older ones are unwanted.
        skip_ids: source ids of samples that are not trained: they keep their places with zero loss weight.
        idle_timeout_s: wait this long for a record at most.
        pump: where this process captures by itself, called instead of waiting; returns whether it got further.
        frees: whether unwanted refs are kept for their features to be freed; one rank does that for all.
    """

    def __init__(
        self,
        plane: ControlPlane,
        *,
        start: int = 0,
        skip_ids: Collection[str] = (),
        idle_timeout_s: float = 600.0,
        pump: Callable[[], bool] | None = None,
        frees: bool = True,
    ):
        self._plane = plane
        self._skip_ids = frozenset(skip_ids)
        self._idle_timeout_s = idle_timeout_s
        self._pump = pump
        self._frees = frees
        self._table = HeadTable(start)  # of the records that count, marked where they were handed out
        self._first: dict[int, RecordHead] = {}  # where another counts now: its sizes do, so that all ranks count alike
        self._loaded: dict[int, LogRecord] = {}  # by seq
        self._pace_s = 0.0  # from one record to the next, as seen while waiting
        self._own_numbers = count(MAX_NUMBER)  # of records that this reader makes itself
        self._lost: set[int] = set()  # their records are void; waiting for the next
        self._unwanted: list[tuple[int, SampleRef]] = []
        self._end: int | None = None
        self._lock = threading.RLock()
        self._cancelled = threading.Event()
        self.skipped: dict[int, str] = {}
        self.num_recaptured = 0
        self._recaptured: Counter[int] = Counter()  # of what is in flight
        self.waiting_for = ""

    def catch_up(self) -> list[LogRecord]:
        """Take in all that the log holds now, and return it."""
        seen: list[LogRecord] = []
        while heads := self._plane.log.poll_heads():
            records = heads.records if heads.records is not None else self._plane.log.load(heads.rows)
            self._take_in(Heads(heads.rows, records))
            seen += records
        return seen

    def skim(self) -> None:
        """Take in all that the log holds now, and read no more of it than is needed."""
        while heads := self._plane.log.poll_heads():
            self._take_in(heads)

    def forget(self, seqs: Iterable[int]) -> None:
        """What was published of these seqs is lost: wait for it to be captured again."""
        self._lost.update(seqs)

    def num_tokens(self, seq: int) -> int:
        """Length of the sample at `seq`, 0 where it was skipped, once it is there. Raises as `get` does."""
        self._wait(range(seq, seq + 1))
        return self._sum(NUM_TOKENS, range(seq, seq + 1))

    def get(self, seqs: range, share: Sequence[int]) -> RefWindow:
        """The window `seqs`, and of it the refs of `share`, once it is complete.

        Raises:
            PeerTimeoutError: no record came for `idle_timeout_s`; names who was waited for.
            PeerFailedError: the last producer failed, or another part ended the run.
            UserError: the log has ended before this window.
        """
        self._wait(seqs)
        with self._lock:
            self._table.mark(seqs)
        return RefWindow(entries=self.entries(share), num_tokens=self._sum(NUM_TOKENS, seqs))

    def entries(self, seqs: Sequence[int]) -> list[WindowEntry]:
        """What is known of seqs of complete windows."""
        refs = [record.ref for record in self._load(seqs)]
        if self._skip_ids:
            refs = [None if ref is None or ref.origin.source_id in self._skip_ids else ref for ref in refs]
        return list(map(WindowEntry, seqs, refs))

    def entry(self, seq: int) -> WindowEntry:
        """As `entries`, of one."""
        return self.entries([seq])[0]

    def num_bytes(self, seqs: range) -> int:
        """Payload of a complete window, the same on every rank."""
        return self._sum(NUM_BYTES, seqs)

    def ack(self, next_seq: int) -> list[SampleRef]:
        """Everything before `next_seq` has been trained. Returns refs of it that nobody reads, to be freed."""
        with self._lock:
            for head in heads_in(self._table.drop(next_seq)):  # came after its window was handed out
                self._discard(head, self._loaded.get(head.seq))
            for of_seqs in (self._loaded, self._first, self._recaptured):
                for seq in [seq for seq in of_seqs if seq < next_seq]:
                    del of_seqs[seq]
            return self._take_unwanted(next_seq)

    def fail(self, entry: WindowEntry, reason: str, *, retryable: bool = True) -> WindowEntry:
        """The features of `entry` cannot be read: blocks until they are captured again or given up.

        Not retryable, or after the bounded attempts, the sample is published as skipped.
        """
        assert entry.ref is not None, "a skipped entry has no features to fail"
        seq = entry.seq
        if self.entry(seq) == entry:  # else it was captured again, or given up, meanwhile
            if retryable and self._plane.ledger.want(seq, entry.ref.generation):
                self._lost.add(seq)
                self._wait(range(seq, seq + 1))
            else:
                self._plane.skip([seq], reason)
                skip = LogRecord(kind="skip", seq=seq, reason=reason)
                rows = rows_of([head_of(skip, next(self._own_numbers))])
                self._take_in(Heads(rows, [skip]))
        with self._lock:
            self._table.mark(range(seq, seq + 1))
        return self.entry(seq)

    def num_recaptured_before(self, next_seq: int) -> int:
        """`num_recaptured` without what a resume at `next_seq` would count again."""
        with self._lock:
            return self.num_recaptured - sum(count for seq, count in self._recaptured.items() if seq >= next_seq)

    def unread(self) -> list[SampleRef]:
        """Refs that were not acknowledged."""
        with self._lock:
            rows = self._table.all_rows()
        records = self._load(rows[have_refs(rows), SEQ].tolist())
        return [record.ref for record in records if record.ref is not None] + self.take_unwanted()

    def take_unwanted(self) -> list[SampleRef]:
        """Refs so far that do not count."""
        with self._lock:
            return self._take_unwanted(None)

    def cancel(self) -> None:
        """Make a call that blocks in another thread raise QueueCancelledError."""
        self._cancelled.set()

    def _take_unwanted(self, below: int | None) -> list[SampleRef]:
        taken = [ref for seq, ref in self._unwanted if below is None or seq < below]
        self._unwanted = [(seq, ref) for seq, ref in self._unwanted if below is not None and seq >= below]
        return taken

    def _sum(self, column: int, seqs: range) -> int:
        """Over the first records of a complete window."""
        with self._lock:
            rows = self._table.rows(seqs)
            replaced = [(self._first[seq], rows[seq - seqs.start].tolist()) for seq in self._first if seq in seqs]
            return int(rows[:, column].sum()) + sum(one[column] - now[column] for one, now in replaced)

    def _take_in(self, heads: Heads) -> None:
        rows, records = heads
        if not len(rows):
            return
        with self._lock:
            simple = bool(have_refs(rows).all()) and not self._skip_ids and not self._lost
            if simple and self._table.has_none_of(rows[:, SEQ]):
                self._table.put(rows)
                if records is not None:
                    self._loaded.update((record.seq, record) for record in records)
                return
            for index, head in enumerate(heads_in(rows)):
                kind = KINDS[head.kind]
                if kind == "begin":
                    self._end = None
                elif kind == "end":
                    self._end = head.seq
                else:
                    self._take(head, rows[index : index + 1], None if records is None else records[index])

    def _take(self, head: RecordHead, row: np.ndarray, record: LogRecord | None) -> None:
        seq = head.seq
        known = self._table.get(seq)
        if seq < self._table.start or (known is not None and not replaces(head, known)):
            self._discard(head, record)
            return
        if known is not None:
            self._discard(known, self._loaded.pop(seq, None))
            self._first.setdefault(seq, known)
            if head.has_ref:
                self.num_recaptured += 1
                self._recaptured[seq] += 1
        self._table.put(row)
        self._lost.discard(seq)
        if record is not None:
            self._loaded[seq] = record
        if not head.has_ref:
            self.skipped[seq] = str(self._load([seq])[0].reason)
        elif self._skip_ids and (ref := self._load([seq])[0].ref) is not None and ref.origin.source_id in self._skip_ids:
            self.skipped[seq] = SKIP_REASON
            self._discard(head, self._loaded[seq])

    def _load(self, seqs: Sequence[int]) -> list[LogRecord]:
        """Their records, which are kept as long as they are in flight."""
        loaded = self._loaded
        missing = [seq for seq in seqs if seq not in loaded]
        if missing:
            with self._lock:
                rows = self._table.pick(missing)
            records = self._plane.log.load(rows)
            with self._lock:
                loaded.update(zip(missing, records, strict=True))
        return [loaded[seq] for seq in seqs]

    def _discard(self, head: RecordHead, record: LogRecord | None = None) -> None:
        if self._frees and head.has_ref:
            if record is None:
                (record,) = self._plane.log.load(rows_of([head]))
            assert record.ref is not None, "it has one"
            self._unwanted.append((head.seq, record.ref))

    def _wait(self, seqs: range) -> None:
        """Until every one of `seqs` has its entry."""
        waited, last_news, last_check, pause = False, time.monotonic(), 0.0, POLL_S[0]
        last_look: float | None = None
        while True:
            heads = self._plane.log.poll_heads()
            self._take_in(heads)
            now = time.monotonic()
            if heads and last_look is not None:
                self._pace_s = (now - last_look) / len(heads.rows)
            num_missing = self._num_missing(seqs)
            if num_missing == 0:
                self.waiting_for = ""
                return
            if self._cancelled.is_set():
                raise QueueCancelledError
            if heads:
                if self._pump is None:  # the rest is not there at once, but when it comes as fast as others did
                    time.sleep(min(max(num_missing * self._pace_s, POLL_S[0]), POLL_S[1]))
                last_news, last_look, pause = now, now, POLL_S[0]
                continue
            last_look = now
            if now - last_check > CHECK_PEERS_S:
                last_check = now
                self.waiting_for = f"{num_missing} of the {len(seqs)} samples of the window at seq {seqs.start}"
                self._check_peers(seqs, now - last_news)
            if not waited:
                waited = True
                self._plane.ledger.count_wait()
            if self._pump is None or not self._pump():
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])

    def _num_missing(self, seqs: range) -> int:
        with self._lock:
            missing = self._table.missing(seqs)
            lost = sum(seq in seqs and self._table.get(seq) is not None for seq in self._lost)
        return len(missing) + lost

    def _check_peers(self, seqs: range, idle_s: float) -> None:
        if failures := producer_failures(self._plane.ledger):
            raise PeerFailedError("; ".join(failures))
        if (status := self._plane.ledger.finished()) is not None:
            raise PeerFailedError(f"the run was ended ({status}) while this process waited for {self.waiting_for}")
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
