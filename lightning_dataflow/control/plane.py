"""The control plane of a run: its log and its ledger, chosen by where the parts run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from lightning_dataflow.contracts import LogRecord, SampleRef, UnknownNameError, UserError
from lightning_dataflow.contracts.log import replaces
from lightning_dataflow.control.leases import MAX_ATTEMPTS, CommitEntry, Lease, NoLease, RunPlan, Sample, Watermarks
from lightning_dataflow.control.ledger import MetadataStore
from lightning_dataflow.control.local.ledger import SqliteMetadataStore
from lightning_dataflow.control.local.log import FileChannel
from lightning_dataflow.control.log import StreamingRefChannel
from lightning_dataflow.control.noop import NoOpMetadataStore
from lightning_dataflow.control.redis.address import RedisAddress
from lightning_dataflow.control.redis.ledger import RedisMetadataStore
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import PATIENCE_S, RedisServer

if TYPE_CHECKING:
    from lightning_dataflow.stores import FeatureStore

DeploymentMode = Literal["local_colocated", "dataflow_colocated", "disaggregated"]
LEDGER = "ledger.sqlite"


@dataclass(frozen=True, kw_only=True)
class ControlPlane:
    """What producers and trainers of a run share beside the feature store.

    Attributes:
        channel: None in `local_colocated`, where nothing is published.
    """

    run_id: str
    ledger: MetadataStore
    channel: StreamingRefChannel | None

    @property
    def log(self) -> StreamingRefChannel:
        """The channel, where there is one."""
        assert self.channel is not None, "local_colocated has no log"
        return self.channel

    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | NoLease:
        """The next group to capture, see MetadataStore.lease. Samples that were tried too often are given up first."""
        while True:
            lease = self.ledger.lease(worker, group=group, num_bytes=num_bytes, watermarks=watermarks, lease_s=lease_s)
            if isinstance(lease, NoLease) or lease.tries < MAX_ATTEMPTS:
                return lease
            reason = f"given up after {lease.tries} tries, the last of which ended or stopped its producer"
            self.give_back(lease, reason, counts=False)

    def publish(
        self, lease: Lease, refs: Mapping[int, SampleRef], skips: Mapping[int, LogRecord] = MappingProxyType({})
    ) -> list[int]:
        """Commit and publish in one transaction. Returns the seqs whose records are in the log now; free the others' refs.

        Args:
            skips: of samples whose features hold NaN or infinity.
        """
        kind: Literal["supersede", "ref"] = "supersede" if lease.attempt else "ref"
        captured = {
            seq: CommitEntry(
                generation=ref.generation,
                num_bytes=ref.num_bytes,
                line=self.log.encode(LogRecord(kind=kind, seq=seq, ref=ref)),
            )
            for seq, ref in refs.items()
        } | {seq: CommitEntry(generation="", num_bytes=0, line=self.log.encode(record)) for seq, record in skips.items()}
        return self.ledger.commit(lease, captured, self.log)

    def give_back(self, lease: Lease, reason: str, *, counts: bool = True) -> None:
        """Return a lease whose capture failed, and publish what is given up with it in one transaction."""
        skips = {seq: self.log.encode(LogRecord(kind="skip", seq=seq, reason=reason)) for seq in lease.wanted}
        self.ledger.give_back(lease, skips, self.log, counts)

    def skip(self, seqs: Iterable[int], reason: str) -> None:
        """Publish that these seqs keep their places in their windows without features."""
        self.log.publish([LogRecord(kind="skip", seq=seq, reason=reason) for seq in seqs])

    def close(self) -> None:
        """Give up connections."""
        self.ledger.close()


def resolve_control_plane(
    mode: DeploymentMode,
    run_id: str,
    *,
    path: str | Path | None = None,
    redis: RedisAddress | None = None,
    patience_s: float = PATIENCE_S,
) -> ControlPlane:
    """The control plane of a deployment.

    Args:
        mode: `local_colocated`: target and trainer take turns in one process, nothing is coordinated or kept.
            `dataflow_colocated`: the full control plane in one process, its ledger in memory. `disaggregated`: a ledger and
            a log that several processes share.
        path: folder of the log, and of the ledger of `disaggregated`; unused by `local_colocated`.
        redis: of `disaggregated`, instead of a folder: for the processes of any number of machines.
        patience_s: how long a call waits for a Redis that went away.

    Raises:
        UserError: the folder cannot be used, or is another machine's; or no Redis that can be used answers.
        PermissionError: Redis does not let us in.
    """
    if mode not in get_args(DeploymentMode):
        raise UnknownNameError(f"unknown deployment mode {mode!r}: available are {', '.join(get_args(DeploymentMode))}")
    if mode == "local_colocated":
        return ControlPlane(run_id=run_id, ledger=NoOpMetadataStore(), channel=None)
    if mode == "disaggregated" and redis is not None:
        server = RedisServer(redis, run_id, patience_s=patience_s)
        return ControlPlane(run_id=run_id, ledger=RedisMetadataStore(server), channel=RedisChannel(server))
    if path is None:
        raise UserError(f"{mode} keeps a log of references: give the path of its folder (channel.path)")
    channel = FileChannel(path)
    ledger = SqliteMetadataStore(Path(path) / LEDGER if mode == "disaggregated" else None)
    return ControlPlane(run_id=run_id, ledger=ledger, channel=channel)


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """What `reconcile_on_restart` found.

    Attributes:
        num_live: samples from the start on whose features are still there.
        lost: published samples that must be captured again; their old records are void.
        swept: what the store removed, by kind.
    """

    num_live: int
    lost: frozenset[int]
    swept: dict[str, int]


def reconcile_on_restart(
    plane: ControlPlane, store: "FeatureStore", plan: RunPlan, read_log: Callable[[], Iterable[LogRecord]]
) -> Reconciliation:
    """Rebuild the ledger from the log and the store, and begin the run at `plan.start`.

    Published samples from `plan.start` on are kept if the store still has them. The others, and those that were leased and
    never published, are wanted again. Features that no live ref names are removed from the store. Doing it twice changes
    nothing.

    Args:
        read_log: returns all records of the log. Called when no producer can commit any more, so that the ledger does not
            miss one.
    """
    attempts = plane.ledger.fence()
    latest = _latest(read_log())
    refs = {seq: record.ref for seq, record in latest.items() if record.ref is not None and plan.start <= seq < plan.stop}
    found = store.exists(list(refs.values()))
    live = {seq: ref for (seq, ref), there in zip(refs.items(), found, strict=True) if there}
    lost = {seq: ref for seq, ref in refs.items() if seq not in live}
    frontier = max(plan.start, max((*latest, *attempts), default=-1) + 1)
    wanted = {seq: 0 for seq in range(plan.start, min(frontier, plan.stop)) if seq not in latest}
    wanted |= {seq: ref.origin.attempt + 1 for seq, ref in lost.items()}
    samples = {seq: Sample("wanted", max(attempt, attempts.get(seq, 0))) for seq, attempt in wanted.items()}
    samples |= {
        seq: Sample("published", ref.origin.attempt, ref.num_bytes, generation=ref.generation) for seq, ref in live.items()
    }
    held = {(ref.sample_id, ref.generation) for ref in live.values()}
    swept = store.sweep(lambda sample_id, generation: (sample_id, generation) in held) if latest else {}
    # A store that cannot list what it holds has swept nothing.
    dead = [ref for seq, record in latest.items() if (ref := record.ref) is not None and seq not in live]
    for ref, there in zip(dead, store.exists(dead), strict=True):
        if there:
            store.free(ref)
    plane.ledger.begin(plan, samples, frontier)
    plane.log.publish([LogRecord(kind="begin", seq=plan.start)])
    return Reconciliation(num_live=len(live), lost=frozenset(lost), swept=swept)


def _latest(log: Iterable[LogRecord]) -> dict[int, LogRecord]:
    """The record of each seq that counts."""
    latest: dict[int, LogRecord] = {}
    for record in log:
        if record.kind in ("ref", "supersede", "skip"):
            known = latest.get(record.seq)
            if known is None or replaces(record, known):
                latest[record.seq] = record
    return latest
