"""Calls of a ledger as tests make them, with the sizes and generations that they expect."""

import socket
from collections.abc import Mapping, Sequence

from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.control import Lease, MetadataStore, RunPlan, Watermarks
from lightning_dataflow.control.leases import CommitEntry, Sample
from tests.records import WIDE, leased, log_of, make_ref

SIZE = 10


HOST = socket.gethostname()


def begin(
    ledger: MetadataStore,
    start: int = 0,
    stop: int = 100,
    window: int = 4,
    *,
    published: Mapping[int, tuple[str, int]] | None = None,
    wanted: Mapping[int, int] | None = None,
    frontier: int | None = None,
) -> None:
    samples = {seq: Sample("wanted", attempt) for seq, attempt in (wanted or {}).items()}
    for seq, (generation, size) in (published or {}).items():
        samples[seq] = Sample("published", int(generation.split("-")[0]), size, generation=generation)
    plan = RunPlan(start=start, stop=stop, window=window)
    ledger.begin(plan, samples, start if frontier is None else frontier)


def lease(ledger: MetadataStore, worker: str = "a", group: int = 4, marks: Watermarks = WIDE, lease_s: float = 60.0):
    return leased(ledger.lease(worker, group=group, num_bytes=lambda seq: SIZE, watermarks=marks, lease_s=lease_s))


def generation(found: Lease, seq: int) -> str:
    return f"{found.attempt}-{seq:016x}"


def commit(
    ledger: MetadataStore, found: Lease, size: int | Sequence[int] = SIZE, seqs: Sequence[int] | None = None
) -> list[int]:
    log = log_of(ledger)
    captured = {
        seq: CommitEntry(
            generation=generation(found, seq),
            num_bytes=size if isinstance(size, int) else size[seq],
            line=log.encode(LogRecord(kind="ref", seq=seq, ref=make_ref(seq, found.attempt))),
        )
        for seq in (found.wanted if seqs is None else seqs)
    }
    return ledger.commit(found, captured, log)


def give_back(ledger: MetadataStore, found: Lease, *, counts: bool = True) -> list[int]:
    log = log_of(ledger)
    skips = {seq: log.encode(LogRecord(kind="skip", seq=seq, reason="it failed")) for seq in found.wanted}
    return ledger.give_back(found, skips, log, counts)


def in_flight(ledger: MetadataStore) -> tuple[int, int]:
    status = ledger.status()
    assert ledger.in_flight() == (status["refs_in_flight"], status["bytes_in_flight"])
    return ledger.in_flight()
