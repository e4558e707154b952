"""The contract of every MetadataStore: who captures which sample, and what became of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from lightning_dataflow.control.fields import read_count, read_number, read_part, read_plan
from lightning_dataflow.control.leases import CommitEntry, Lease, NoLease, RunPlan, Sample, Watermarks
from lightning_dataflow.control.log import StreamingRefChannel

SILENT_S = 90.0
"""A process elsewhere that said nothing for so long has died."""
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


class MetadataStore(ABC):
    """The ledger of a run. Safe for threads, and for processes where the backend is.

    A seq is leased, then published, then freed; a lost one is wanted again, with the next attempt. Of several attempts at
    one seq a single one is published: `commit` tells the worker whether its own attempt was.

    Attributes:
        term: of the claim that the changes of this store belong to; "" where they belong to none.
    """

    term = ""

    @abstractmethod
    def fence(self) -> dict[int, int]:
        """Void all leases: nothing is leased or committed until the next `begin`.

        Returns seq → the next attempt, of samples that were leased or wanted again.
        """

    @abstractmethod
    def begin(self, plan: RunPlan, samples: Mapping[int, Sample], frontier: int) -> None:
        """A trainer starts or resumes. Replaces what was known of samples; leases from before are void.

        Args:
            samples: by seq: published ones, whose features are there, and those below `frontier` that are wanted again.
            frontier: the first seq that was never leased.
        """

    def plan(self) -> RunPlan | None:
        """The plan of the latest `begin`; None before it."""
        text = self._run_values().get("plan")
        return None if text is None else read_plan(text)

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
        """The leases of `worker` that have not expired end `lease_s` from now; with 0, at once: it is known to be dead."""

    @abstractmethod
    def give_back(self, lease: Lease, skips: Mapping[int, bytes], log: StreamingRefChannel, counts: bool) -> list[int]:
        """Return a lease whose capture failed, and append to `log` the skips of those seqs that have failed too often. One
        transaction. Returns those seqs.

        Args:
            skips: seq → its record, encoded by the log, of all that the lease wanted.
            counts: whether this failure counts against the samples; one of the store does not.
        """

    @abstractmethod
    def commit(self, lease: Lease, captured: Mapping[int, CommitEntry], log: StreamingRefChannel) -> list[int]:
        """Commit what was captured and append it to `log`, in one transaction. Returns the seqs whose commit this is.

        Samples without a generation are given up.
        Leaves out seqs that another attempt took over or published, and everything once the run is finished.
        """

    @abstractmethod
    def want(self, seq: int, generation: str) -> bool:
        """Ask for a published sample to be captured again because that generation is lost. Asking twice is asking once.

        False when its attempts are used up: the sample is given up. A finished run gives up nothing.
        """

    def free(self, seqs: Iterable[int]) -> None:
        """The features of these seqs were freed, or will never come."""
        self._update({}, seqs)

    def ack(self, next_seq: int, global_step: int, freed: Iterable[int] = ()) -> None:
        """The optimizer step that used everything before `next_seq` has been applied, and this rank has freed `freed`.

        One transaction.
        """
        self._update({"trained_seq": next_seq, "trained_step": global_step}, freed)

    def ack_durable(self, next_seq: int, global_step: int) -> None:
        """A complete checkpoint holds that step."""
        self._update({"durable_seq": next_seq, "durable_step": global_step}, ())

    @abstractmethod
    def count_wait(self) -> None:
        """A trainer found its next window incomplete. Capture's own waits are counted by `lease`."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """No more samples are needed: leases end, and producers do. A later `begin` reopens the run."""

    def finished(self, since: float = 0.0) -> str | None:
        """The status of `finish`; None while the run goes on, and when it finished before `since`, a time of `now`."""
        values = self._run_values()
        return values.get("finished") if read_number(values, "finished_at") >= since else None

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

    def join(self) -> None:
        """The changes of this store, too, belong to the latest claim: this process takes part in it."""
        self.term = str(self._run_values().get("term", ""))

    def is_ours(self) -> bool:
        """Whether no other process has claimed the run since this one claimed it, or joined."""
        return not self.term or self.term == str(self._run_values().get("term", ""))

    def parts(self) -> list[dict[str, Any]]:
        """The last sign of life of each process of the run: name, host, pid, pids (whose process ids these are, see
        `pid_space`), state, seen_s_ago, failed, fatal.
        """
        now = self.now()
        return [read_part(name, text, now) for name, text in sorted(self._part_texts().items())]

    @abstractmethod
    def in_flight(self) -> tuple[int, int]:
        """References and bytes that are reserved by a lease or published, and not freed. Cheap."""

    def status(self) -> dict[str, Any]:
        """Counts and states for people; see `lightning-dataflow status`."""
        values, samples, num_in_flight = self._run_values(), self._sample_states(), self.in_flight()[0]
        states = [state for state, _ in samples.values()]
        numbers = {name: read_count(values, name) for name in TOTALS} | {"refs_in_flight": num_in_flight}
        kept = [size for seq, (state, size) in samples.items() if state == "published" and seq < numbers["trained_seq"]]
        return {
            "plan": asdict(read_plan(values["plan"])) if "plan" in values else None,
            "finished": values.get("finished"),
            **numbers,
            "leased": states.count("leased"),
            "wanted_again": states.count("wanted"),
            "waiting_to_be_trained": states.count("published") - len(kept),
            "kept_refs": len(kept),
            "kept_bytes": sum(kept),
            "parts": self.parts(),
        }

    def close(self) -> None:  # noqa: B027
        """Give up connections."""

    @abstractmethod
    def _update(self, totals: Mapping[str, int], freed: Iterable[int]) -> None:
        """Set these of TOTALS, and forget samples that were freed. One transaction."""

    @abstractmethod
    def _run_values(self) -> Mapping[str, Any]:
        """What is known of the run, by name: TOTALS, plan, finished, finished_at, term."""

    @abstractmethod
    def _sample_states(self) -> Mapping[int, tuple[str, int]]:
        """seq → (state, bytes) of what is in flight."""

    @abstractmethod
    def _part_texts(self) -> Mapping[str, str]:
        """What processes reported last, by name, as JSON; see `this_process`."""
