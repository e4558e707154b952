"""The contract of every MetadataStore: who captures which sample, and what became of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control.log import StreamingRefChannel

SILENT_S = 60.0
"""A process elsewhere that said nothing for so long has died."""
FATAL = 2
"""What a part is reported with: 0 is alive, 1 failed."""
MAX_ATTEMPTS = 3
"""A sample whose capture failed this often is given up."""
TOTALS = (
    "frontier",
    "bytes_in_flight",
    "refs_in_flight",
    "published",
    "recaptured",
    "given_up",
    "trained_seq",
    "trained_step",
    "durable_seq",
    "durable_step",
    "paused",
    "capture_waits",
    "train_waits",
)
"""Counts of a ledger, as `status` gives them."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a trainer needs: seqs [start, stop), in windows of `window` seqs per optimizer step."""

    start: int
    stop: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Watermarks:
    """Bounds on what is in flight: reserved by a lease or published, and not freed yet.

    Capture pauses when a further group would exceed `high_bytes` or `high_refs`, and goes on at the low marks. The window
    that the trainer waits for is captured above the low marks too, so nothing waits for itself.

    Raises:
        UserError: a low mark is not below its high mark.
    """

    high_bytes: int
    high_refs: int
    low_bytes: int
    low_refs: int

    def __post_init__(self) -> None:
        for unit in ("bytes", "refs"):
            low, high = getattr(self, f"low_{unit}"), getattr(self, f"high_{unit}")
            if not 0 <= low < high:
                raise UserError(f"the low watermark of {low} {unit} is not below the high one of {high}: lower it")

    def check_window(self, num_refs: int, num_bytes: int) -> None:
        """Raise UserError when a window does not fit below the high marks: training could never start it."""
        for unit, size, high in (("refs", num_refs, self.high_refs), ("bytes", num_bytes, self.high_bytes)):
            if size > high:
                raise UserError(
                    f"a window can have {size} {unit}, the high watermark is {high} {unit}: raise "
                    f"topology.high_{unit} (and store.capacity_bytes), or lower data.global_batch_size or data.max_length"
                )


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A worker's right to capture one group of prompts until it expires.

    Attributes:
        seqs: the whole group: it is captured as one batch, the same in every attempt.
        wanted: those of them whose features are to be published.
        attempt: of this capture; higher than that of every earlier one of these samples.
        tries: how often one of them failed already, or had its lease expire. From MAX_ATTEMPTS on it must be given up:
            `ControlPlane.lease` does.
        plan: of the run.
    """

    worker: str
    seqs: tuple[int, ...]
    wanted: tuple[int, ...]
    attempt: int
    plan: RunPlan
    tries: int = 0


class NoLease(NamedTuple):
    """Why `lease` gave nothing.

    Attributes:
        reason: `not begun`: no trainer has said what it needs. `paused`: the watermarks allow no further group now.
            `nothing left`: everything is leased or published.
        plan: of the run, once it has begun.
        finished_at: when the run was finished, on the ledger's clock.
    """

    reason: Literal["not begun", "finished", "paused", "nothing left"]
    plan: RunPlan | None = None
    finished_at: float = 0.0


class CommitEntry(NamedTuple):
    """What the ledger and the log are told of a captured sample.

    Attributes:
        num_bytes: payload of its features.
        line: its record, encoded by the log.
    """

    generation: str
    num_bytes: int
    line: bytes


class MetadataStore(ABC):
    """The ledger of a run. Safe for threads, and for processes where the backend is.

    A seq is leased, then published, then freed; a lost one is wanted again, with the next attempt. Of several attempts at
    one seq a single one is published: `commit` tells the worker whether it is his.
    """

    @abstractmethod
    def fence(self) -> dict[int, int]:
        """Void all leases: nothing is leased or committed until the next `begin`.

        Returns seq → the next attempt, of samples that were leased or wanted again.
        """

    @abstractmethod
    def begin(
        self, plan: RunPlan, *, published: Mapping[int, tuple[str, int]], wanted: Mapping[int, int], frontier: int
    ) -> None:
        """A trainer starts or resumes. Replaces what was known of samples; leases from before are void.

        Args:
            published: seq → (generation, bytes) of samples whose features are there.
            wanted: seq → attempt of samples below `frontier` that must be captured again.
            frontier: the first seq that was never leased.
        """

    @abstractmethod
    def plan(self) -> RunPlan | None:
        """The plan of the latest `begin`; None before it."""

    @abstractmethod
    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | NoLease:
        """The next group to capture: what is wanted again or was leased by a dead worker first, then in seq order.

        Groups are seqs [k·group, (k + 1)·group). A lease that expired counts as a failed try of its samples: they may be
        what killed its holder.

        Args:
            num_bytes: seq → payload of its features, which are reserved.
        """

    @abstractmethod
    def renew(self, worker: str, lease_s: float) -> None:
        """All leases of `worker` end `lease_s` from now; with 0, at once: it is known to be dead."""

    @abstractmethod
    def give_back(
        self,
        lease: Lease,
        skips: Mapping[int, bytes],
        log: StreamingRefChannel,
        *,
        counts: bool = True,
    ) -> list[int]:
        """Return a lease whose capture failed, and append to `log` the skips of those seqs that have failed too often. One
        transaction. Returns those seqs.

        Args:
            skips: seq → its record, encoded by the log, of all that the lease wanted.
            counts: whether this failure counts against the samples; one of the store does not.
        """

    @abstractmethod
    def commit(self, lease: Lease, captured: Mapping[int, CommitEntry], log: StreamingRefChannel) -> list[int]:
        """Commit what was captured and append it to `log`, in one transaction. Returns the seqs whose commit this is.

        Leaves out seqs that another attempt took over or published, and everything once the run is finished.
        """

    @abstractmethod
    def want(self, seq: int, generation: str) -> bool:
        """Ask for a published sample to be captured again because that generation is lost. Asking twice is asking once.

        False when its attempts are used up: the sample is given up. A finished run gives up nothing.
        """

    @abstractmethod
    def free(self, seqs: Iterable[int]) -> None:
        """The features of these seqs were freed, or will never come."""

    @abstractmethod
    def ack(self, next_seq: int, global_step: int, freed: Iterable[int] = ()) -> None:
        """The optimizer step that used everything before `next_seq` has been applied, and this rank has freed `freed`.

        One transaction.
        """

    @abstractmethod
    def ack_durable(self, next_seq: int, global_step: int) -> None:
        """A complete checkpoint holds that step."""

    @abstractmethod
    def count_wait(self) -> None:
        """A trainer found its next window incomplete. Capture's own waits are counted by `lease`."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """No more samples are needed: leases end, and producers do. A later `begin` reopens the run."""

    @abstractmethod
    def finished(self, since: float = 0.0) -> str | None:
        """The status of `finish`; None while the run goes on, and when it finished before `since`, a time of `now`."""

    @abstractmethod
    def now(self) -> float:
        """Seconds on the ledger's clock, which is one for all processes of a run."""

    @abstractmethod
    def report(self, name: str, state: str, *, failed: bool = False, fatal: bool = False) -> None:
        """A sign of life of a process of the run, and what it does or waits for.

        Args:
            failed: these are its last words.
            fatal: and no other process could do better.
        """

    @abstractmethod
    def claim(self, name: str, state: str, before: tuple[str, int] | None) -> bool:
        """Report `name` as this process's, if the last to report it is still `before`, a (host, process id) or nobody.

        One transaction, of which one caller alone has its way. It ends the plan before; nothing is leased until `begin`.
        From then on the changes of this store belong to this claim: once another process claims, each raises
        PeerFailedError, which names it.
        """

    @abstractmethod
    def join(self) -> None:
        """The changes of this store, too, belong to the latest claim: this process takes part in it."""

    @abstractmethod
    def is_ours(self) -> bool:
        """Whether no other process has claimed the run since this one claimed it, or joined."""

    @abstractmethod
    def parts(self) -> list[dict[str, Any]]:
        """The last sign of life of each process of the run: name, host, pid, pids (whose process ids these are, see
        `pid_space`), state, seen_s_ago, failed, fatal.
        """

    def failures(self) -> list[str]:
        """What failed processes reported since the latest `begin`. Others may go on: see `heartbeat.producer_failures`."""
        return [f"{part['name']}: {part['state']}" for part in self.parts() if part["failed"]]

    @abstractmethod
    def in_flight(self) -> tuple[int, int]:
        """References and bytes that are reserved by a lease or published, and not freed. Cheap."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """Counts and states for people; see `lightning-dataflow status`."""

    def close(self) -> None:  # noqa: B027
        """Give up connections."""
