"""The drive loop of a producer: lease a group, capture it, put it into the store, publish its refs."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from lightning_dataflow.contracts import (
    BrokenFeaturesError,
    CapacityError,
    CaptureMismatchError,
    LogRecord,
    NotFiniteError,
    PeerFailedError,
    PeerGoneError,
    PeerTimeoutError,
    SampleRef,
    UserError,
)
from lightning_dataflow.contracts.waiting import Wait
from lightning_dataflow.control import MAX_ATTEMPTS, ControlPlane, Lease, NoLease, RunPlan, Watermarks
from lightning_dataflow.control.heartbeat import Heartbeat
from lightning_dataflow.data.announcement import Announcement
from lightning_dataflow.producers.feeds import CapturedSample, Feed
from lightning_dataflow.stores import FeatureStore, StoreUnavailableError

State = Literal["captured", "failed", "idle", "finished"]
IDLE_S = (0.002, 0.1)
WAITING, ALL_CAPTURED = "waiting for the trainer to begin", "all captured"
LOADED_AT = time.monotonic()
MAX_FAILURES = 3 * MAX_ATTEMPTS
"""A worker stops after this many failed leases in a row: three groups, each with all its tries."""
NO_FAULT_OF_PROMPTS = (
    *(CapacityError, NotFiniteError, PeerFailedError, PeerGoneError, PeerTimeoutError),
    StoreUnavailableError,
)


@dataclass(eq=False)
class RolloutWorker:
    """Captures what the ledger leases to it. Any number of workers share a run; each needs a name of its own.

    Attributes:
        group: prompts that are captured as one batch; the same for all workers of a run.
        lease_s: how long a lease of a worker that died stays valid.
        peer_timeout_s: how long to wait for a trainer to begin, or to show a sign of life.

    Raises:
        UserError: a producer has announced other data under this run_id.
    """

    name: str
    feed: Feed
    plane: ControlPlane
    store: FeatureStore
    watermarks: Watermarks
    _: KW_ONLY
    group: int = 1
    lease_s: float = 30.0
    peer_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        self.state = WAITING
        self.num_captured = 0
        # On the ledger's clock. An end of the run before this is ignored: a trainer may resume it.
        self._since = self.plane.ledger.now() - (time.monotonic() - LOADED_AT)
        self._failures_in_a_row = 0
        self._stop_waiting = threading.Event()
        self._checked_plan: RunPlan | None = None
        self._closed_plan: RunPlan | None = None
        counts = self.feed.token_counts()
        announcement = Announcement(
            run_id=self.plane.run_id,
            card=self.feed.card,
            num_samples=len(self.feed),
            seed=self.feed.seed,
            token_counts={token: int(counts[token]) for token in counts.nonzero().flatten().tolist()},
            capture_batch_size=self.group,
            largest_bytes=max(self.feed.sizes),
        )
        self.plane.log.announce(announcement.to_json())

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Capture until the trainer has finished.

        Raises:
            PeerTimeoutError: no trainer began, or the trainer gave no sign of life.
            StoreUnavailableError: the store did not come back. No sample is charged with a failure.
            CaptureMismatchError: the target captures something else than was announced.
            NotFiniteError: the target captures nothing but NaN or infinity.
            PeerFailedError: no capture server has answered for too long.
            UserError: a watermark is below a window.
        """
        self.plane.ledger.renew(self.name, 0)  # those of a process that had this name and died
        with Heartbeat(self.plane.ledger, self.name, lambda: self.state, renew_s=self.lease_s).until("finished"):
            self._drive(should_stop)

    def stop_waiting(self) -> None:
        """Make `run`, in another thread, stop waiting for servers, the store, or room in it."""
        self._stop_waiting.set()
        self.feed.stop_waiting()
        self.store.stop_waiting()

    def run_once(self) -> State:
        """Capture at most one group."""
        lease = self.plane.lease(
            self.name,
            group=self.group,
            num_bytes=self.feed.num_bytes,
            watermarks=self.watermarks,
            lease_s=self.lease_s,
        )
        try:
            self._check_windows(lease.plan)
        except UserError as error:
            if isinstance(lease, Lease):
                self.plane.give_back(lease, str(error), counts=False)
            raise
        if isinstance(lease, NoLease):
            return self._without_lease(lease)
        self.state = f"capturing seq {lease.seqs[0]}"
        return self._capture(lease)

    def _without_lease(self, answer: NoLease) -> State:
        if answer.reason == "finished" and answer.finished_at >= self._since:
            return "finished"
        reasons = {"paused": "waiting for the trainer to free samples", "nothing left": ALL_CAPTURED}
        self.state = reasons.get(answer.reason, WAITING)
        if answer.reason == "nothing left" and answer.plan is not None:
            self._end_log(answer.plan)
        return "idle"

    def _end_log(self, plan: RunPlan) -> None:
        """Close the log once everything planned is published, so that a reader who expects more fails at once."""
        ledger = self.plane.ledger
        if plan != self._closed_plan and ledger.status()["leased"] == 0 and ledger.plan() == plan:
            self.plane.log.close(plan.stop)
            self._closed_plan = plan

    def _drive(self, should_stop: Callable[[], bool]) -> None:
        pause, wait = IDLE_S[0], Wait(self._waited_for)
        while not should_stop():
            state = self.run_once()
            if state == "finished":
                return
            if state != "idle":
                pause = IDLE_S[0]
                wait.restart()
                continue
            self._check_trainer(wait.seconds())
            time.sleep(pause)
            pause = min(2 * pause, IDLE_S[1])

    def _waited_for(self) -> str:
        is_done = self.state == ALL_CAPTURED
        return "the trainer to finish: all is captured" if is_done else self.state.removeprefix("waiting for ")

    def _capture(self, lease: Lease) -> State:
        refs: dict[int, SampleRef] = {}
        skips: dict[int, LogRecord] = {}
        try:
            for sample in self.feed.capture(lease.seqs, lease.attempt, lease.wanted):
                try:
                    refs[sample.seq] = self._put(sample)
                except BrokenFeaturesError as error:
                    skips[sample.seq] = _skip(sample, str(error))
            accepted = self.plane.publish(lease, refs, skips)
        except BaseException as error:
            return self._give_back(lease, refs, error)
        self._free(refs[seq] for seq in refs.keys() - set(accepted))  # another attempt has published these
        self.num_captured += len(accepted)
        self._failures_in_a_row = 0
        return "captured"

    def _put(self, sample: CapturedSample) -> SampleRef:
        """Store a sample. While the store is full, retry for up to `lease_s`."""
        wait, pause = Wait(f"room in the store, for {sample.origin.sample_id}"), IDLE_S[0]
        while True:
            try:
                return self.feed.put(sample, self.store)
            except CapacityError:
                if wait.seconds() > self.lease_s or self._stop_waiting.is_set() or self.plane.ledger.finished() is not None:
                    raise
                self.state = "waiting for room in the store"
                self._stop_waiting.wait(pause)
                pause = min(2 * pause, self.feed.longest_pause_s)
            except (BrokenFeaturesError, NotFiniteError, StoreUnavailableError):
                raise
            except Exception:
                with suppress(StoreUnavailableError):
                    self.store.abort(sample.origin.sample_id)  # it may have been stored in part
                raise

    def _give_back(self, lease: Lease, refs: Mapping[int, SampleRef], error: BaseException) -> State:
        """Return a lease whose capture failed, and raise `error` unless this worker can go on."""
        blames_prompts = isinstance(error, Exception) and not isinstance(error, NO_FAULT_OF_PROMPTS)
        reason = f"capture failed: {str(error) or type(error).__name__}"
        self.plane.give_back(lease, reason, counts=blames_prompts)
        if not isinstance(error, StoreUnavailableError | PeerTimeoutError):  # after the latter they may be published
            self._free(refs.values())
        if isinstance(error, CapacityError):
            return "idle"
        if isinstance(error, PeerGoneError):
            return "failed"
        self._failures_in_a_row += 1
        if not blames_prompts or isinstance(error, CaptureMismatchError) or self._failures_in_a_row >= MAX_FAILURES:
            raise error
        return "failed"

    def _free(self, refs: Iterable[SampleRef]) -> None:
        for ref in refs:
            self.store.free(ref)

    def _check_windows(self, plan: RunPlan | None) -> None:
        """Raise UserError unless the largest possible window fits below the watermarks."""
        if plan is None or plan == self._checked_plan:
            return
        sizes = sorted(self.feed.sizes, reverse=True)
        # Groups are captured whole, and the one that holds a window's last sample may begin with it.
        num_refs = min(plan.window + self.group - 1, plan.stop - plan.start)
        passes, rest = divmod(num_refs, len(sizes))
        self.watermarks.check_window(num_refs, passes * sum(sizes) + sum(sizes[:rest]))
        self._checked_plan = plan

    def _check_trainer(self, waited_s: float) -> None:
        if waited_s < self.peer_timeout_s:
            return
        parts = [part for part in self.plane.ledger.parts() if part["name"].startswith("trainer")]
        if not parts:
            raise PeerTimeoutError(
                f"waited {waited_s:.0f} s for a trainer to begin in {self.plane.log.name}: start one with role=trainer"
            )
        last = min(parts, key=lambda part: part["seen_s_ago"])
        if last["seen_s_ago"] > self.peer_timeout_s:
            raise PeerTimeoutError(
                f"{last['name']} on {last['host']} gave no sign of life for {last['seen_s_ago']:.0f} s "
                f"(it was {last['state']}): start it again, or end this producer"
            )


def _skip(sample: CapturedSample, reason: str) -> LogRecord:
    return LogRecord(kind="skip", seq=sample.seq, reason=reason, num_tokens=sample.origin.num_tokens)
