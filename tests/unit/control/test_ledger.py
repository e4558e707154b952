"""One contract, every ledger: who captures what, what became of it, and how much may be in flight."""

import os
import random
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_dataflow.channels import FileChannel
from lightning_dataflow.channels.redis_server import RedisServer
from lightning_dataflow.contracts import LogRecord, PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.control import (
    MAX_ATTEMPTS,
    Captured,
    Lease,
    MetadataStore,
    NoOpMetadataStore,
    RedisMetadataStore,
    RunPlan,
    SqliteMetadataStore,
    Watermarks,
    sqlite_tables,
)
from lightning_dataflow.control.heartbeat import Heartbeat, become_trainer, check_no_other_trainer, end_leases, why_over
from tests.streams import WIDE, forked, log_of, make_ref

SIZE = 10
HOST = socket.gethostname()


def begin(ledger: MetadataStore, start: int = 0, stop: int = 100, window: int = 4, **known: Any) -> None:
    plan = RunPlan(start=start, stop=stop, window=window)
    ledger.begin(plan, **{"published": {}, "wanted": {}, "frontier": start} | known)


def lease(ledger: MetadataStore, worker: str = "a", group: int = 4, marks: Watermarks = WIDE, lease_s: float = 60.0):
    return ledger.lease(worker, group=group, num_bytes=lambda seq: SIZE, watermarks=marks, lease_s=lease_s)


def generation(found: Lease, seq: int) -> str:
    return f"{found.attempt}-{seq:016x}"


def commit(
    ledger: MetadataStore, found: Lease, size: int | Sequence[int] = SIZE, seqs: Sequence[int] | None = None
) -> list[int]:
    log = log_of(ledger)
    captured = {
        seq: Captured(
            generation=generation(found, seq),
            num_bytes=size if isinstance(size, int) else size[seq],
            line=log.encode(LogRecord(kind="ref", seq=seq, ref=make_ref(seq, found.attempt))),
        )
        for seq in (found.wanted if seqs is None else seqs)
    }
    return ledger.commit(found, captured, log)


def give_back(ledger: MetadataStore, found: Lease, **options: bool) -> list[int]:
    log = log_of(ledger)
    skips = {seq: log.encode(LogRecord(kind="skip", seq=seq, reason="it failed")) for seq in found.wanted}
    return ledger.give_back(found, skips, log, **options)


def in_flight(ledger: MetadataStore) -> tuple[int, int]:
    status = ledger.status()
    assert ledger.in_flight() == (status["refs_in_flight"], status["bytes_in_flight"])
    return ledger.in_flight()


def marks(refs: int, low: int = 0) -> Watermarks:
    return Watermarks(high_bytes=1 << 40, high_refs=refs, low_bytes=1 << 39, low_refs=low)


def test_nothing_is_leased_before_a_run_begins(ledger):
    assert ledger.plan() is None
    assert lease(ledger) is None
    begin(ledger, stop=8)
    assert ledger.plan() == RunPlan(start=0, stop=8, window=4)


def test_leases_are_disjoint_in_order_and_end(ledger):
    begin(ledger, stop=40)
    found = [lease(ledger, worker) for worker in "abcabcabca"]
    assert [one.seqs for one in found] == [tuple(range(at, at + 4)) for at in range(0, 40, 4)]
    assert [one.worker for one in found] == list("abcabcabca")
    assert all(one.wanted == one.seqs and one.attempt == 0 for one in found)
    assert lease(ledger) is None
    assert in_flight(ledger) == (40, 400)


def test_groups_are_fixed_wherever_a_run_begins_or_ends(ledger):
    begin(ledger, start=6, stop=18)
    first, second, third, last = (lease(ledger) for _ in range(4))
    assert (first.seqs, first.wanted) == ((4, 5, 6, 7), (6, 7))
    assert (second.seqs, second.wanted) == ((8, 9, 10, 11), (8, 9, 10, 11))
    assert third.seqs == (12, 13, 14, 15)
    assert (last.seqs, last.wanted) == ((16, 17), (16, 17))
    assert in_flight(ledger) == (12, 120)


def test_an_expired_lease_goes_on_with_the_next_attempt_and_the_old_worker_is_fenced(ledger):
    begin(ledger)
    old = lease(ledger, "old", lease_s=-1)
    new = lease(ledger, "new")
    assert (new.seqs, new.wanted, new.attempt) == (old.seqs, old.wanted, 1)
    assert in_flight(ledger) == (4, 40)
    assert commit(ledger, old) == []
    assert give_back(ledger, old) == []
    assert commit(ledger, new) == [0, 1, 2, 3]
    assert commit(ledger, new) == []
    assert lease(ledger, "old").seqs == (4, 5, 6, 7)


def test_an_expired_lease_that_nobody_took_still_counts(ledger):
    begin(ledger)
    found = lease(ledger, lease_s=-1)
    assert commit(ledger, found) == [0, 1, 2, 3]


def test_one_worker_that_leases_its_own_expired_group_again(ledger):
    begin(ledger)
    old = lease(ledger, "a", lease_s=-1)
    new = lease(ledger, "a")
    assert commit(ledger, old) == []
    assert commit(ledger, new) == [0, 1, 2, 3]


def test_leases_are_renewed_by_worker(ledger):
    begin(ledger)
    lease(ledger, "a", lease_s=0.05)
    lease(ledger, "b", lease_s=0.05)
    ledger.renew("b", 60)
    time.sleep(0.06)
    assert lease(ledger, "c").seqs == (0, 1, 2, 3)
    assert lease(ledger, "c").seqs == (8, 9, 10, 11)


def test_what_is_given_back_is_leased_first_and_given_up_after_bounded_tries(ledger):
    begin(ledger)
    found = lease(ledger)
    lease(ledger)
    for attempt in range(1, MAX_ATTEMPTS):
        assert give_back(ledger, found) == []
        found = lease(ledger)
        assert (found.seqs, found.attempt) == ((0, 1, 2, 3), attempt)
    assert give_back(ledger, found) == [0, 1, 2, 3]
    assert lease(ledger).seqs == (8, 9, 10, 11)
    assert ledger.status()["given_up"] == 4
    assert in_flight(ledger) == (8, 80)


def test_what_is_not_retryable_is_given_up_at_once(ledger):
    begin(ledger)
    assert give_back(ledger, lease(ledger), retryable=False) == [0, 1, 2, 3]
    assert in_flight(ledger) == (0, 0)


def test_a_failure_that_does_not_count(ledger):
    begin(ledger)
    for attempt in range(2 * MAX_ATTEMPTS):
        found = lease(ledger)
        assert (found.seqs, found.attempt) == ((0, 1, 2, 3), attempt)
        assert give_back(ledger, found, counts=False) == []
    assert in_flight(ledger) == (4, 40)


@pytest.fixture
def failing_log(tmp_path, monkeypatch):
    """A log whose file cannot be written."""
    log = FileChannel(tmp_path / "failing")

    def fail(lines):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "append", fail)
    return log


@pytest.mark.parametrize("path", [None, "ledger.sqlite"])
def test_a_log_that_cannot_be_written_undoes_what_goes_with_it(tmp_path, failing_log, path):
    ledger = SqliteMetadataStore(path and tmp_path / path)
    begin(ledger)
    found = lease(ledger)
    captured = {seq: Captured(generation="0-0", num_bytes=1, line=b"") for seq in found.wanted}
    with pytest.raises(OSError, match="No space left"):
        ledger.commit(found, captured, failing_log)
    with pytest.raises(OSError, match="No space left"):
        ledger.give_back(found, dict.fromkeys(found.wanted, b""), failing_log, retryable=False)
    assert ledger.status()["published"] == ledger.status()["given_up"] == 0
    ledger.commit(found, captured, FileChannel(tmp_path))
    assert ledger.status()["published"] == 4


def test_an_expired_lease_is_a_failed_try(ledger):
    begin(ledger)
    for tries in range(MAX_ATTEMPTS):
        assert lease(ledger, lease_s=-1).tries == tries
    found = lease(ledger)
    assert (found.seqs, found.tries, found.attempt) == ((0, 1, 2, 3), MAX_ATTEMPTS, MAX_ATTEMPTS)
    assert give_back(ledger, found, counts=False) == [0, 1, 2, 3]
    assert lease(ledger).tries == 0


def test_only_samples_that_failed_too_often_themselves_are_given_up(ledger):
    begin(ledger)
    commit(ledger, first := lease(ledger))
    assert ledger.want(2, generation(first, 2))
    for tries in range(1, MAX_ATTEMPTS):
        assert lease(ledger, lease_s=-1).tries == tries
    assert ledger.want(3, generation(first, 3))
    found = lease(ledger)
    assert (found.wanted, found.tries) == ((2, 3), MAX_ATTEMPTS)
    assert give_back(ledger, found, counts=False) == [2]
    assert lease(ledger).wanted == (3,)


def test_the_leases_of_a_worker_that_is_known_to_be_dead_end_at_once(ledger):
    begin(ledger)
    lease(ledger, "dead")
    lease(ledger, "alive")
    ledger.renew("dead", 0)
    time.sleep(0.001)
    assert lease(ledger, "other").seqs == (0, 1, 2, 3)
    assert lease(ledger, "other").seqs == (8, 9, 10, 11)


def test_the_leases_of_all_workers_of_a_dead_process_end_at_once(ledger, monkeypatch):
    begin(ledger)
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 7)
        for worker in ("producer-host-7-0", "producer-host-7-1"):
            ledger.report(worker, "capturing")
            lease(ledger, worker)
        patch.setattr("lightning_dataflow.control.redis.pid_space", lambda: "another host")  # SQLite has one host
        if isinstance(ledger, RedisMetadataStore):
            ledger.report("producer-there-7", "capturing")
    ledger.report("producer-host-77", "capturing")
    lease(ledger, "producer-there-7")
    lease(ledger, "producer-host-77")
    end_leases(ledger, 7)
    time.sleep(0.001)
    assert [lease(ledger, "other").seqs[0] for _ in range(3)] == [0, 4, 16]


def test_a_part_of_a_group_may_be_committed(ledger):
    begin(ledger)
    found = lease(ledger)
    assert commit(ledger, found, seqs=(1, 2)) == [1, 2]
    assert commit(ledger, found) == [0, 3]


def test_counters_are_exact(ledger):
    begin(ledger)
    found = lease(ledger)
    assert commit(ledger, found, size=7) == [0, 1, 2, 3]
    assert in_flight(ledger) == (4, 28)
    ledger.free([0, 2, 77])
    ledger.free([0])
    assert in_flight(ledger) == (2, 14)
    lease(ledger)
    assert in_flight(ledger) == (6, 54)
    status = ledger.status()
    assert (status["leased"], status["wanted_again"], status["waiting_to_be_trained"]) == (4, 0, 2)


def test_a_lost_sample_is_captured_again_with_its_group(ledger):
    begin(ledger)
    found = lease(ledger)
    commit(ledger, found)
    lost = generation(found, 2)
    assert ledger.want(2, lost)
    assert ledger.want(2, lost)  # the other rank noticed too
    again = lease(ledger, "b")
    assert (again.seqs, again.wanted, again.attempt) == ((0, 1, 2, 3), (2,), 1)
    assert ledger.want(2, lost)
    assert lease(ledger).seqs == (4, 5, 6, 7)
    assert commit(ledger, again) == [2]
    assert ledger.want(2, lost)  # of the generation before
    assert lease(ledger).seqs == (8, 9, 10, 11)
    assert in_flight(ledger) == (12, 120)
    assert ledger.status()["recaptured"] == 1


def test_wanting_is_bounded(ledger):
    begin(ledger)
    found = lease(ledger)
    commit(ledger, found)
    for _ in range(MAX_ATTEMPTS - 1):
        assert ledger.want(0, generation(found, 0))
        found = lease(ledger)
        commit(ledger, found)
    assert not ledger.want(0, generation(found, 0))
    assert not ledger.want(0, generation(found, 0))
    assert not ledger.want(55, "0-0")
    assert in_flight(ledger) == (3, 30)
    assert ledger.status()["given_up"] == 1


def test_a_finished_run_gives_nothing_up(ledger):
    """A rank that still reads while another ends the run must not publish samples as skipped."""
    begin(ledger)
    found = lease(ledger)
    commit(ledger, found)
    ledger.finish("failed")
    assert ledger.want(0, generation(found, 0))


def test_low_watermarks_must_be_lower():
    for low_refs, low_bytes in ((4, 1), (1, 40), (-1, 1)):
        with pytest.raises(UserError, match=r"the low watermark of -?\d+ \w+ is not below the high one of \d+: lower it"):
            Watermarks(high_refs=4, low_refs=low_refs, high_bytes=40, low_bytes=low_bytes)


@pytest.mark.parametrize("unit", ["refs", "bytes"])
def test_capture_pauses_above_the_high_mark_and_goes_on_at_the_low_one(ledger, unit):
    high = {"high_refs": 1 << 30, "low_refs": 1 << 29, "high_bytes": 1 << 30, "low_bytes": 1 << 29}
    bound = Watermarks(
        **high | {f"high_{unit}": 16 * (SIZE if unit == "bytes" else 1), f"low_{unit}": 8 * (10 if unit == "bytes" else 1)}
    )
    begin(ledger)
    for at in range(0, 16, 4):
        commit(ledger, found := lease(ledger, marks=bound))
        assert found.seqs[0] == at
    assert lease(ledger, marks=bound) is None
    assert lease(ledger, marks=bound) is None
    ledger.free(range(4))
    ledger.ack(4, 1)
    assert lease(ledger, marks=bound) is None  # below the high mark, not yet at the low one
    ledger.free(range(4, 8))
    ledger.ack(8, 2)
    assert lease(ledger, marks=bound).seqs[0] == 16
    assert ledger.status()["capture_waits"] == 1


def test_a_sample_that_fits_alone_waits_for_its_group(ledger):
    begin(ledger)
    assert lease(ledger, marks=marks(7, 1)).seqs == (0, 1, 2, 3)
    assert lease(ledger, marks=marks(7, 1)) is None


def test_the_window_that_the_trainer_waits_for_is_never_paused_and_others_stay_so(ledger):
    bound = marks(8, 1)
    begin(ledger, window=4)
    for _ in range(4):
        commit(ledger, lease(ledger, group=2, marks=bound))
    assert lease(ledger, group=2, marks=bound) is None
    ledger.free(range(7))
    ledger.ack(8, 2)  # the trainer waits for 8 to 11, and rank 1 is about to free seq 7
    ledger.free([7])
    assert lease(ledger, group=2, marks=marks(8, 0)).seqs == (8, 9)
    begin(ledger, window=4, published={seq: ("0-0", SIZE) for seq in range(8)}, frontier=8)
    assert lease(ledger, group=2, marks=bound) is None
    ledger.free(range(5))
    ledger.ack(6, 1)
    assert lease(ledger, group=2, marks=bound).seqs == (8, 9)  # awaited: 6 to 9
    assert lease(ledger, group=2, marks=bound) is None  # not awaited, and still above the low mark


def test_a_lost_window_that_is_awaited_goes_above_the_marks(ledger):
    known = {seq: ("0-0", SIZE) for seq in range(4, 16)}
    begin(ledger, published=known, wanted={seq: 1 for seq in range(4)}, frontier=16)
    assert in_flight(ledger) == (16, 120)
    found = lease(ledger, marks=marks(8, 2))
    assert (found.wanted, found.attempt) == ((0, 1, 2, 3), 1)
    assert in_flight(ledger) == (16, 160)
    assert lease(ledger, marks=marks(8, 2)) is None


def test_lost_samples_that_are_not_awaited_wait(ledger):
    begin(ledger, published={seq: ("0-0", SIZE) for seq in range(8)}, wanted={8: 1}, frontier=12)
    assert lease(ledger, marks=marks(8, 2)) is None
    ledger.ack(8, 2)
    assert lease(ledger, marks=marks(8, 2)).wanted == (8,)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_walk_never_exceeds_the_marks_and_never_starves(ledger, seed):
    """Workers lease, commit, fail or vanish while a trainer takes windows: in flight is bounded, all is trained."""
    draw = random.Random(seed)
    window, group = draw.choice([(4, 4), (4, 1), (6, 4), (4, 8)])
    stop, high = 24 * window, max(window, group) + group + draw.randrange(12)
    bound = Watermarks(
        high_refs=high, low_refs=draw.randrange(high), high_bytes=high * 9, low_bytes=draw.randrange(high * 9)
    )
    size = [draw.randrange(1, 10) for _ in range(stop)]
    begin(ledger, stop=stop, window=window)
    held: list[Lease] = []
    published: set[int] = set()
    trained = idle = 0
    while trained < stop:
        action = draw.random()
        if action < 0.45:
            expiry = -1.0 if draw.random() < 0.2 else 60.0
            found = ledger.lease(
                draw.choice("abc"), group=group, num_bytes=size.__getitem__, watermarks=bound, lease_s=expiry
            )
            held += [found] if found else []
        elif action < 0.8 and held:
            found = held.pop(draw.randrange(len(held)))
            accepted = set(commit(ledger, found, size))
            assert not published & accepted
            published |= accepted
        elif action < 0.85 and held:
            give_back(ledger, held.pop(), counts=False)
        elif published >= set(range(trained, trained + window)):
            ledger.free(range(trained, trained + window))
            trained += window
            ledger.ack(trained, trained // window)
            idle = 0
        refs, num_bytes = in_flight(ledger)
        assert refs <= bound.high_refs
        assert num_bytes <= bound.high_bytes
        idle += 1
        assert idle < 1000, "the awaited window starves"
    assert published >= set(range(stop))


def test_begin_replaces_what_was_known_and_voids_leases(ledger):
    begin(ledger)
    old = lease(ledger)
    ledger.report("producer-0", "out of memory", failed=True)
    ledger.report("trainer-0", "training")
    begin(ledger, start=4, stop=20, published={5: ("0-0", 7)}, wanted={4: 2}, frontier=8)
    assert commit(ledger, old) == []
    assert in_flight(ledger) == (2, 7)
    assert ledger.failures() == []
    assert [part["name"] for part in ledger.status()["parts"]] == ["trainer-0"]
    found = lease(ledger)
    assert (found.seqs, found.wanted, found.attempt) == ((4, 5, 6, 7), (4,), 2)
    assert lease(ledger).seqs == (8, 9, 10, 11)
    assert ledger.status()["trained_seq"] == 4


def test_a_fence_voids_leases_until_the_next_begin(ledger):
    begin(ledger)
    old, other = lease(ledger), lease(ledger)
    commit(ledger, other)
    ledger.want(5, generation(other, 5))
    assert ledger.fence() == {0: 1, 1: 1, 2: 1, 3: 1, 5: 1}
    assert ledger.fence() == {0: 1, 1: 1, 2: 1, 3: 1, 5: 1}
    assert commit(ledger, old) == []
    assert give_back(ledger, old, retryable=False) == []
    assert lease(ledger) is None
    assert ledger.plan() is None


def test_a_finished_run_is_over_until_it_begins_again(ledger):
    begin(ledger)
    old = lease(ledger)
    assert ledger.finished() is None
    before = ledger.now()
    ledger.finish("completed")
    assert ledger.finished() == ledger.finished(since=before) == "completed"
    assert ledger.finished(since=ledger.now() + 1) is None
    assert lease(ledger) is None
    assert commit(ledger, old) == []
    assert give_back(ledger, old) == []
    assert in_flight(ledger) == (0, 0)
    begin(ledger)
    assert ledger.finished() is None
    assert lease(ledger).seqs == (0, 1, 2, 3)


def test_failures_and_signs_of_life(ledger):
    ledger.report("producer-1", "capturing seq 4")
    ledger.report("producer-0", "CUDA out of memory", failed=True)
    assert ledger.failures() == ["producer-0: CUDA out of memory"]
    assert why_over(ledger) == []  # the other one goes on
    ledger.report("producer-0", "finished")
    assert ledger.failures() == []
    first, second = ledger.status()["parts"]
    assert (first["name"], first["state"], first["failed"]) == ("producer-0", "finished", False)
    assert 0 <= second["seen_s_ago"] < 5
    assert second["pid"] > 0


def test_a_run_is_over_when_no_producer_is_left(ledger, monkeypatch):
    gone = 2**22 + 1  # no process has this id
    ledger.report("trainer-0", "training")
    ledger.report("producer-0", "CUDA out of memory", failed=True)
    assert why_over(ledger) == ["producer-0: CUDA out of memory"]
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: gone)
        ledger.report("producer-1", "capturing seq 4")
    assert why_over(ledger) == ["producer-0: CUDA out of memory", f"producer-1: its process {gone} on {HOST} is gone"]
    ledger.report("supervisor", "watching")
    assert why_over(ledger) == []  # it starts one again, or ends the run
    ledger.report("producer-2", "another seed", failed=True, fatal=True)
    assert why_over(ledger) == ["producer-0: CUDA out of memory", "producer-2: another seed"]
    begin(ledger)
    assert why_over(ledger) == []


def test_one_that_died_without_a_word_may_be_started_again(ledger, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 2**22 + 1)
        ledger.report("producer-0", "capturing seq 4")
    assert why_over(ledger) == []


def test_a_heartbeat_outlives_a_ledger_that_is_blocked(ledger, monkeypatch):
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.EVERY_S", 0.01)
    report, blocked = ledger.report, threading.Event()

    def block(*arguments, **options):
        if not blocked.is_set():
            blocked.set()
            raise PeerTimeoutError("stopped")
        report(*arguments, **options)

    monkeypatch.setattr(ledger, "report", block)
    heartbeat = Heartbeat(ledger, "a", lambda: "capturing")
    time.sleep(0.1)
    assert ledger.status()["parts"][0]["state"] == "capturing"
    heartbeat.stop("done")


def test_a_heartbeat_reports_and_renews(ledger, monkeypatch):
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.EVERY_S", 0.01)
    begin(ledger)
    lease(ledger, "a", lease_s=0.05)
    heartbeat = Heartbeat(ledger, "a", lambda: "capturing", renew_s=60.0)
    time.sleep(0.1)
    assert lease(ledger, "b").seqs == (4, 5, 6, 7)
    assert ledger.status()["parts"][0]["state"] == "capturing"
    heartbeat.stop("it broke", failed=True)
    assert ledger.failures() == ["a: it broke"]


def test_status_counts_progress(ledger):
    begin(ledger)
    ledger.count_wait()
    ledger.count_wait()
    ledger.ack(8, 2)
    ledger.ack_durable(4, 1)
    status = ledger.status()
    expected = {
        "trained_seq": 8,
        "trained_step": 2,
        "durable_seq": 4,
        "durable_step": 1,
        "train_waits": 2,
        "finished": None,
    }
    assert {name: status[name] for name in expected} == expected
    assert status["plan"] == {"start": 0, "stop": 100, "window": 4}


def test_the_noop_ledger_accepts_all_and_keeps_nothing():
    ledger = NoOpMetadataStore()
    begin(ledger, published={0: ("0-0", 1)})
    assert ledger.plan() is None
    assert lease(ledger) is None
    own = Lease(worker="a", seqs=(0, 1), wanted=(0, 1), attempt=0)
    assert commit(ledger, own) == commit(ledger, own) == [0, 1]
    assert give_back(ledger, own) == []
    assert not ledger.want(0, "0-0")
    assert ledger.fence() == {}
    ledger.finish("completed")
    ledger.report("a", "b", failed=True)
    assert ledger.finished() is None
    assert ledger.failures() == []
    assert in_flight(ledger) == (0, 0)


def work(path: Path, worker: str) -> None:
    ledger = SqliteMetadataStore(path)
    with open(path.parent / worker, "w") as mine:
        while (found := lease(ledger, worker, group=2)) is not None:
            for seq in commit(ledger, found):
                mine.write(f"{seq}\n")


def test_several_processes_on_one_file(tmp_path):
    path = tmp_path / "ledger.sqlite"
    begin(SqliteMetadataStore(path), stop=600)
    workers = [forked(work, path, f"worker-{index}") for index in range(4)]
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    seqs = [int(line) for file in tmp_path.glob("worker-*") for line in file.read_text().splitlines()]
    assert sorted(seqs) == list(range(600))
    assert in_flight(SqliteMetadataStore(path)) == (600, 6000)


def open_and_report(path: Path, name: str) -> None:
    SqliteMetadataStore(path).report(name, "here")


def test_several_processes_open_a_new_file_at_once(tmp_path):
    path = tmp_path / "ledger.sqlite"
    processes = [forked(open_and_report, path, f"part-{index}") for index in range(8)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(SqliteMetadataStore(path).status()["parts"]) == 8


def test_a_process_that_is_stopped_inside_a_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_tables, "BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "ledger.sqlite"
    ledger, other = SqliteMetadataStore(path), SqliteMetadataStore(path)
    begin(ledger)
    found = lease(ledger)
    with (
        pytest.raises(PeerTimeoutError, match=r"could not use the ledger .*locked.* is a process of the run stopped"),
        ledger._tables.transaction(),
    ):
        other.ack(1, 1)
    assert other.finished() is None
    assert commit(ledger, found) == [0, 1, 2, 3]


def hold_and_stop(path: Path, number: int) -> None:
    ledger = SqliteMetadataStore(path)
    with ledger._tables.transaction():
        (path.parent / "held").touch()
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_stops_or_dies_inside_a_write_blocks_for_a_bounded_time(tmp_path, monkeypatch, number):
    """A stopped one for BUSY_TIMEOUT_S, and until it goes on; a killed one not at all."""
    monkeypatch.setattr(sqlite_tables, "BUSY_TIMEOUT_S", 0.3)
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteMetadataStore(path)
    begin(ledger)
    holder = forked(hold_and_stop, path, number)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    start = time.monotonic()
    if number == signal.SIGKILL:
        holder.join()
        assert lease(ledger).seqs == (0, 1, 2, 3)
    else:
        with pytest.raises(PeerTimeoutError, match="is a process of the run stopped inside a write"):
            lease(ledger)
        assert ledger.finished() is None  # readers are not blocked
        holder.kill()
        holder.join()
        assert lease(ledger).seqs == (0, 1, 2, 3)
    assert time.monotonic() - start < 2


def test_a_ledger_of_another_machine(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    SqliteMetadataStore(path).close()
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(UserError, match=r"was made on .*, this is elsewhere: .* delete the file"):
        SqliteMetadataStore(path)


def test_files_that_are_no_ledgers(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 20)
    for wrong in (path, tmp_path, tmp_path / "nowhere" / "ledger.sqlite"):
        with pytest.raises(UserError, match=r"cannot use .* as a ledger .*: choose another channel\.path"):
            SqliteMetadataStore(wrong)


def test_a_ledger_that_is_damaged_while_it_is_used(tmp_path):
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteMetadataStore(path)
    begin(ledger, stop=5000, window=8)
    for _ in range(50):
        commit(ledger, lease(ledger, group=8))
    ledger.close()
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\x55" * (size - 4096))
    with pytest.raises(UserError, match=r"(the ledger .* is damaged|as a ledger) .*(malformed|not a database)"):
        again = SqliteMetadataStore(path)
        commit(again, lease(again, group=8))


def test_a_full_disk_is_an_error_of_the_system_with_the_path(tmp_path):
    ledger = SqliteMetadataStore(tmp_path / "ledger.sqlite")
    begin(ledger, stop=50000, window=8)
    (pages,) = ledger._tables.db.execute("PRAGMA page_count").fetchone()
    ledger._tables.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match=r"No space left on device: .*ledger\.sqlite"):
        for _ in range(1000):
            commit(ledger, lease(ledger, group=8))
    ledger._tables.db.execute("PRAGMA max_page_count = 100000")
    commit(ledger, lease(ledger, group=8))  # and it goes on where there is room again


def test_the_file_stays_small(tmp_path):
    ledger = SqliteMetadataStore(tmp_path / "ledger.sqlite")
    begin(ledger, stop=5000, window=8)
    for seq in range(0, 5000, 8):
        commit(ledger, lease(ledger, group=8))
        ledger.free(range(seq, seq + 8))
        ledger.ack(seq + 8, seq // 8 + 1)
    assert in_flight(ledger) == (0, 0)
    ledger.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 64 << 10
    rows = sqlite3.connect(tmp_path / "ledger.sqlite").execute("SELECT COUNT(*) FROM samples").fetchone()
    assert rows == (0,)


def test_clocks_of_other_hosts_do_not_matter(redis_run, monkeypatch):
    """Leases, ends and signs of life are told by the server's clock."""
    here = RedisMetadataStore(redis_run)
    begin(here)
    mine = lease(here, "a", lease_s=60.0)
    for shift in (-86400.0, 86400.0):
        with monkeypatch.context() as patch:
            now = time.time() + shift
            patch.setattr("time.time", lambda now=now: now)
            there = RedisMetadataStore(RedisServer(redis_run.where, redis_run.run_id))
            assert set(lease(there, "b").seqs).isdisjoint(mine.seqs)
            there.renew("a", 60.0)
            there.report("trainer-0", "training")
            assert abs(there.now() - here.now()) < 5
            there.finish("interrupted")
            assert there.finished(since=here.now() - 5) == here.finished(since=there.now() - 5) == "interrupted"
            assert here.finished(since=there.now() + 1) is None
        assert 0 <= here.status()["parts"][0]["seen_s_ago"] < 5
        begin(here)
        mine = lease(here, "a", lease_s=60.0)


def test_one_of_several_claims(ledger):
    """Also where a dead trainer was before, or the run is finished."""
    assert ledger.claim("trainer-0", "beginning", None)
    me = (HOST, os.getpid())
    assert not ledger.claim("trainer-0", "beginning", None)
    assert not ledger.claim("trainer-0", "beginning", (HOST, 1))
    begin(ledger)
    ledger.finish("completed")
    assert ledger.claim("trainer-0", "beginning", me)
    assert (ledger.plan(), ledger.finished()) == (None, None)
    (part,) = ledger.status()["parts"]
    assert (part["name"], part["host"], part["pid"], part["state"]) == ("trainer-0", *me, "beginning")


def test_a_trainer_whose_run_was_claimed_changes_nothing(open_ledger):
    """It was cut off for a while, and another began meanwhile. Its ranks neither; producers belong to nobody's claim."""
    old, rank, new, producer = (open_ledger() for _ in range(4))
    assert old.claim("trainer-0", "beginning", None)
    begin(old)
    rank.join()
    found = lease(producer)
    assert commit(producer, found) == [0, 1, 2, 3]
    rank.free([3])
    assert new.claim("trainer-0", "beginning", (HOST, os.getpid()))
    begin(new, published={seq: (generation(found, seq), SIZE) for seq in range(4)}, frontier=4)
    assert [one.is_ours() for one in (old, rank, new, producer)] == [False, False, True, True]
    changes = [
        old.fence,
        lambda: begin(old),
        lambda: old.ack(4, 1, [0, 1]),
        lambda: old.ack_durable(4, 1),
        lambda: old.want(0, generation(found, 0)),
        lambda: old.finish("completed"),
        lambda: old.report("trainer-0", "training"),
        lambda: rank.free([1]),
        lambda: rank.want(1, generation(found, 1)),
        rank.count_wait,
    ]
    if isinstance(old, RedisMetadataStore):
        changes.append(lambda: log_of(old).publish([LogRecord(kind="skip", seq=0, reason="lost")]))
    for change in changes:
        with pytest.raises(PeerFailedError, match=rf"process {os.getpid()} on {HOST} has taken over this run"):
            change()
    assert in_flight(new) == (4, 4 * SIZE)
    status = new.status()
    assert (status["trained_seq"], status["durable_seq"], status["finished"]) == (0, 0, None)
    assert [part["state"] for part in status["parts"]] == ["beginning"]
    new.ack(4, 1, range(4))
    assert commit(producer, lease(producer)) == [4, 5, 6, 7]
    assert old.claim("trainer-0", "again", (HOST, os.getpid()))  # a later one wins again
    assert [one.is_ours() for one in (old, new)] == [True, False]


def test_as_many_samples_as_anybody_may_have_in_flight(ledger):
    """A checkpoint frees thousands at once; a group of thousands is leased and committed."""
    begin(ledger, stop=60_000, published={seq: ("0-0123456789abcdef", SIZE) for seq in range(20_000)}, frontier=20_000)
    ledger.free(range(10_000))
    ledger.ack(20_000, 1, range(10_000, 20_000))
    assert in_flight(ledger) == (0, 0)
    found = lease(ledger, group=5_000)
    assert (found.seqs, found.wanted) == (tuple(range(20_000, 25_000)), tuple(range(20_000, 25_000)))
    assert commit(ledger, found) == list(found.wanted)
    assert in_flight(ledger) == (5_000, 5_000 * SIZE)


def test_parts_that_have_died_are_forgotten(ledger, monkeypatch):
    """Producers come and go; a trainer that begins forgets who has not been heard of."""
    begin(ledger)
    ledger.report("producer-0", "capturing")
    monkeypatch.setattr(f"{type(ledger).__module__}.SILENT_S", 0.0)
    time.sleep(0.01)
    begin(ledger)
    assert ledger.status()["parts"] == []
    ledger.report("producer-0", "capturing")
    assert [part["name"] for part in ledger.status()["parts"]] == ["producer-0"]


def test_a_trainer_that_came_between_look_and_claim_is_found(redis_run, monkeypatch):
    ledger, other = RedisMetadataStore(redis_run), RedisMetadataStore(RedisServer(redis_run.where, redis_run.run_id))
    claim = ledger.claim

    def late(*arguments):
        monkeypatch.setattr(ledger, "claim", claim)
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", os.getppid)
            assert other.claim("trainer-0", "beginning", None)
        return claim(*arguments)

    monkeypatch.setattr(ledger, "claim", late)
    with pytest.raises(UserError, match=rf"process {os.getppid()} on {HOST} trains run run \(beginning\): end it first"):
        become_trainer(ledger, "run")


def test_another_trainer_on_another_host(redis_run, monkeypatch):
    """One that gives signs of life is refused, one that gives none is waited for and then is none."""
    ledger = RedisMetadataStore(redis_run)
    begin(ledger)
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.FRESH_S", 1.0)
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.CLOSE_S", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_dataflow.control.redis.pid_space", lambda: "another host's")
        ledger.report("trainer-0", "training")
        start = time.monotonic()
        check_no_other_trainer(ledger, "run")
        assert 0.5 < time.monotonic() - start < 5
        ledger.report("trainer-0", "training")
        again = threading.Timer(0.4, ledger.report, ["trainer-0", "training"])
        again.start()
        with pytest.raises(UserError, match=rf"process {os.getpid()} on {HOST} trains run run \(training\): end it first"):
            check_no_other_trainer(ledger, "run")
        again.join()
        ledger.report("producer-0", "it broke", failed=True)
        ledger.report("producer-1", "capturing")
    assert why_over(ledger) == []  # the other one was seen just now
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.SILENT_S", 0.0)
    assert why_over(ledger) == ["producer-0: it broke", f"producer-1: its process {os.getpid()} on {HOST} is gone"]
