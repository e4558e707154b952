"""Signs of life, and what follows from their absence."""

import os
import sqlite3
import threading
import time

import pytest

from lightning_dataflow.contracts import PeerTimeoutError, UserError
from lightning_dataflow.control import RedisMetadataStore
from lightning_dataflow.control.heartbeat import Heartbeat, check_no_other_trainer, claim_trainer, producer_failures
from lightning_dataflow.control.redis.server import RedisServer
from tests.records import failures
from tests.unit.control.ledgers import HOST, begin, lease


def test_failures_and_signs_of_life(ledger):
    ledger.report("producer-1", "capturing seq 4")
    ledger.report("producer-0", "CUDA out of memory", failed=True)
    assert failures(ledger) == ["producer-0: CUDA out of memory"]
    assert producer_failures(ledger) == []  # the other one goes on
    ledger.report("producer-0", "finished")
    assert failures(ledger) == []
    first, second = ledger.status()["parts"]
    assert (first["name"], first["state"], first["failed"]) == ("producer-0", "finished", False)
    assert 0 <= second["seen_s_ago"] < 5
    assert second["pid"] > 0


def test_a_run_is_over_when_no_producer_is_left(ledger, monkeypatch):
    gone = 2**22 + 1  # no process has this id
    ledger.report("trainer-0", "training")
    ledger.report("producer-0", "CUDA out of memory", failed=True)
    assert producer_failures(ledger) == ["producer-0: CUDA out of memory"]
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: gone)
        ledger.report("producer-1", "capturing seq 4")
    assert producer_failures(ledger) == [
        "producer-0: CUDA out of memory",
        f"producer-1: its process {gone} on {HOST} is gone",
    ]
    ledger.report("supervisor", "watching")
    assert producer_failures(ledger) == []  # it starts one again, or ends the run
    ledger.report("producer-2", "another seed", failed=True, fatal=True)
    assert producer_failures(ledger) == ["producer-0: CUDA out of memory", "producer-2: another seed"]
    begin(ledger)
    assert producer_failures(ledger) == []


def test_one_that_died_without_a_word_may_be_started_again(ledger, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 2**22 + 1)
        ledger.report("producer-0", "capturing seq 4")
    assert producer_failures(ledger) == []


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
    assert failures(ledger) == ["a: it broke"]


FAULTS = (sqlite3.OperationalError("database is locked"), OSError(28, "No space left on device"), ValueError("odd"))


def failing(function, times: int):
    """Raises each of FAULTS so often, and then does what it should."""
    left = [fault for fault in FAULTS for _ in range(times)]

    def call(*arguments, **options):
        if left:
            raise left.pop()
        return function(*arguments, **options)

    return call, left


@pytest.mark.integration
@pytest.mark.parametrize("broken", ["report", "renew", "describe"])
def test_no_error_ends_a_heartbeat(ledger, monkeypatch, caplog, broken):
    """The lease is held while each beat fails, where that is possible, and once none does."""
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.EVERY_S", 0.01)
    begin(ledger)
    lease(ledger, "a", lease_s=0.5)
    described, left = failing(lambda: "capturing", 2 if broken == "describe" else 0)
    if broken != "describe":
        call, left = failing(getattr(ledger, broken), 2)
        monkeypatch.setattr(ledger, broken, call)
    heartbeat = Heartbeat(ledger, "a", described, renew_s=60.0)
    time.sleep(0.7)
    assert left == []
    assert lease(ledger, "b").seqs == (4, 5, 6, 7)
    assert ledger.status()["parts"][0]["state"] == "capturing"
    heartbeat.stop("done")
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("heartbeat")]
    assert sorted(messages) == sorted(
        f"a could not give a sign of life ({fault!r}); it goes on and tries again" for fault in FAULTS
    )


@pytest.mark.parametrize("fault", [*FAULTS, PeerTimeoutError("stopped")], ids=lambda fault: type(fault).__name__)
def test_last_words_that_fail_hide_no_other_error(ledger, monkeypatch, caplog, fault):
    """They are logged even where beats have failed in the same way before."""
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.EVERY_S", 0.01)
    beats = threading.Semaphore(0)

    def fail(*arguments, **options):
        beats.release()
        raise fault

    monkeypatch.setattr(ledger, "report", fail)
    heartbeat = Heartbeat(ledger, "a", lambda: "capturing")
    assert all(beats.acquire(timeout=5) for _ in range(2))  # at the second the first has been logged
    caplog.clear()
    heartbeat.stop("it broke", failed=True)
    assert [record.getMessage() for record in caplog.records] == [f"a could not leave its last words ({fault!r}): it broke"]


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
        claim_trainer(ledger, "run")


@pytest.mark.integration
def test_another_trainer_on_another_host(redis_run, monkeypatch):
    """One that gives signs of life is refused, one that gives none is waited for and then is none."""
    ledger = RedisMetadataStore(redis_run)
    begin(ledger)
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.FRESH_S", 1.0)
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.CLOSE_S", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_dataflow.control.processes.pid_space", lambda: "another host's")
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
    assert producer_failures(ledger) == []  # the other one was seen just now
    monkeypatch.setattr("lightning_dataflow.control.heartbeat.SILENT_S", 0.0)
    assert producer_failures(ledger) == ["producer-0: it broke", f"producer-1: its process {os.getpid()} on {HOST} is gone"]
