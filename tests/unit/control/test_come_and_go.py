"""Producers that are killed at any moment while others come: no sample twice, none missing."""

import random
import time
from collections.abc import Callable

import pytest

from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.control import ControlPlane, NoLease, RunPlan, reconcile_on_restart, resolve_control_plane
from tests.records import WIDE, forked, make_ref

NUM_SAMPLES, WINDOW, LEASE_S = 600, 8, 0.2


def produce(opener: Callable[[], ControlPlane], name: str) -> None:
    plane = opener()
    while True:
        lease = plane.lease(name, group=4, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=LEASE_S)
        if isinstance(lease, NoLease):
            if lease.reason == "finished":
                return
            time.sleep(0.01)
            continue
        time.sleep(0.002)
        plane.publish(lease, {seq: make_ref(seq, lease.attempt) for seq in lease.wanted})


def counted(records: list[LogRecord]) -> dict[tuple[int, int], int]:
    """(seq, attempt) → how often it was published."""
    found: dict[tuple[int, int], int] = {}
    for record in records:
        if record.ref is not None:
            key = record.seq, record.ref.origin.attempt
            found[key] = found.get(key, 0) + 1
    return found


@pytest.fixture(params=["sqlite", "redis"])
def opener(request, tmp_path) -> Callable[[], ControlPlane]:
    if request.param == "sqlite":
        return lambda: resolve_control_plane("disaggregated", "run", path=tmp_path)
    server = request.getfixturevalue("redis_run")
    return lambda: resolve_control_plane("disaggregated", server.run_id, redis=server.where)


@pytest.mark.integration
def test_producers_come_and_go(opener):
    from lightning_dataflow.data import StreamingRefQueue
    from lightning_dataflow.stores import MemoryFeatureStore

    draw = random.Random(0)
    plane = opener()
    plane.log.announce({"run_id": "run"})
    queue = StreamingRefQueue(plane, idle_timeout_s=20)
    plan = RunPlan(start=0, stop=NUM_SAMPLES, window=WINDOW)
    reconcile_on_restart(plane, MemoryFeatureStore(), plan, queue.catch_up)
    names = iter(f"producer-{index}" for index in range(10_000))
    workers = [forked(produce, opener, next(names)) for _ in range(3)]
    kills, slowest, trained = 0, 0.0, []
    for start in range(0, NUM_SAMPLES, WINDOW):
        if draw.random() < 0.15:
            victim = draw.randrange(3)
            workers[victim].kill()
            workers[victim].join()
            workers[victim] = forked(produce, opener, next(names))
            kills += 1
        seqs = range(start, start + WINDOW)
        since = time.monotonic()
        trained += [seq for seq, ref in zip(seqs, queue.get(seqs, seqs).refs, strict=True) if ref is not None]
        slowest = max(slowest, time.monotonic() - since)
        queue.ack(seqs.stop)
        plane.ledger.ack(seqs.stop, start // WINDOW + 1, seqs)
    plane.ledger.finish("completed")
    for worker in workers:
        worker.join(5)
        assert worker.exitcode == 0
    assert kills > 5
    assert sorted(trained + list(queue.skipped)) == list(range(NUM_SAMPLES))
    assert len(queue.skipped) <= 4 * kills / 3  # three died of one group of four
    print(f"{kills} killed; the longest wait for a window {slowest:.2f} s, leases end after {LEASE_S} s")
    assert slowest < LEASE_S + 2  # a dead producer's prompts wait for its lease at most
    plane.log.rewind()
    assert set(counted(StreamingRefQueue(plane).catch_up()).values()) == {1}
