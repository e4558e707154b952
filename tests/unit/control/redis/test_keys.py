"""What a run leaves in Redis and in its folder, and what others wrote there."""

import json
import shutil

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control.leases import CommitEntry
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.services.redis import LocalRedis
from tests.records import WIDE, failures
from tests.unit.control.redis.calls import begun, channel, refs

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)


def test_what_others_write_is_checked(own):
    log = channel(own())
    log.announce({"run_id": "run"})
    good = log.encode(refs(1)[0])
    for number, (line, message) in enumerate(
        (
            (b"{", "unexpected end of data"),
            (b"[]", "not a log record"),
            (good.replace(b'"num_bytes":', b'"num_bytes":1'), "the ref is damaged, capture the sample again"),
            (good.replace(b'"seq":1', b'"seq":-1'), "not a log record"),
        ),
        1,
    ):
        log.server.ask("XADD", log.server.key("log"), f"{number}-7", "record", line)
        with pytest.raises(UserError, match=rf"Redis at .*, run run, record {number}, is damaged: .*{message}"):
            assert [record.ref for record in log.poll()] == []  # a ref is checked when it is asked for
        log._position = f"{number}-7".encode()
    for card in (b"{", b"[]", b"{}"):
        log.server.ask("SET", log.server.key("card"), card)
        with pytest.raises(UserError, match=r"the card of .* is damaged .* another run_name"):
            log.card()
    log.server.ask("SET", log.server.key("card"), b'{"run_id": "run", "schema_version": 7}')
    with pytest.raises(UserError, match=r"has schema version 7 .* this release reads 3"):
        log.card()


def test_two_servers_do_not_share_a_folder(own, monkeypatch):
    server = own()
    monkeypatch.setattr("lightning_dataflow.services.redis.LOCK_TIMEOUT_S", 0.1)
    with pytest.raises(UserError, match=r"another process runs a Redis in .*: the run goes on, so end it first"):
        LocalRedis(server.folder)


def test_a_completed_run_that_a_dead_process_was_in_leaves_no_file(own):
    server = own()
    dead = channel(server)
    dead.publish(refs(0))
    ledger = begun(dead.server)
    RedisServer(server.where, "run")
    ledger.finish("completed")
    server.close()
    assert {path.name for path in server.folder.iterdir()} == {"redis.log", "redis-lock"}


def test_an_interrupted_run_leaves_what_its_resume_needs(own):
    server = own()
    log = channel(server)
    log.publish(refs(0))
    begun(log.server).finish("interrupted")
    server.close()
    assert (server.folder / "appendonlydir").is_dir()


def test_the_last_to_leave_a_completed_run_removes_it(own):
    server = own()
    log, other = channel(server), channel(server)
    log.announce({"run_id": "run"})
    ledger = begun(log.server)
    log.publish(refs(0))
    other.publish(refs(1))
    ledger.finish("interrupted")
    asks = RedisServer(server.where, "other")
    ledger.close()
    other.server.leave()
    assert asks.ask("DBSIZE") >= 3  # for a resume
    log, other = channel(server), channel(server)
    ledger = begun(log.server)
    other.publish(refs(2))
    ledger.finish("completed")
    assert asks.ask("TTL", log.server.key("totals")) > 3000
    ledger.close()
    assert asks.ask("DBSIZE") > 3  # the other one still reads
    other.server.leave()
    assert asks.ask("DBSIZE") == 0
    assert server.secret_file.stat().st_mode & 0o77 == 0
    server.close()
    assert {path.name for path in server.folder.iterdir()} == {"redis.log", "redis-lock"}


def test_who_died_long_ago_is_forgotten(own):
    """Processes that join and die do not fill the run's keys, and keep nothing from being removed."""
    server = own()
    log = channel(server)
    ledger, asks = begun(log.server), RedisServer(server.where, "run")
    for index in range(50):
        asks.ask("HSET", asks.key("clients"), f"dead-{index}", "3 1000 true")
        part = {"host": "h", "pid": index, "pids": "p", "seen": 1000.0, "state": "capturing", "failed": index % 2 == 1}
        asks.ask("HSET", asks.key("parts"), f"producer-{index}", json.dumps(part))
        leased = ledger.lease(f"producer-{index}", group=4, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=-1)
        assert leased.seqs == (0, 1, 2, 3)
    other = channel(server)
    other.publish(refs(0))
    assert asks.ask("HLEN", asks.key("clients")) == 2
    ledger.report("producer-new", "capturing")
    assert [part["name"] for part in ledger.status()["parts"]] == ["producer-new"]
    assert failures(ledger) == []
    assert asks.ask("ZCARD", asks.key("open")) == 4
    asks.ask("HSET", asks.key("clients"), "dead", "3 1000 true")
    ledger.finish("completed")
    other.server.leave()
    ledger.close()
    assert asks.ask("DBSIZE") == 0


def test_what_is_said_after_the_end_does_not_stay(own):
    server = own()
    log = channel(server)
    ledger, dead, asks = begun(log.server), channel(server), RedisServer(server.where, "run")
    dead.publish(refs(0))
    ledger.finish("completed")
    ledger.report("producer-0", "it broke", failed=True)
    ledger.close()
    times = {name: asks.ask("TTL", asks.key(name)) for name in ("totals", "log", "clients", "parts")}
    assert all(3500 < seconds <= 3600 for seconds in times.values()), times


def test_workers_that_hold_nothing_leave_no_trace(own):
    ledger = begun(channel(own()).server)
    log = RedisChannel(ledger.server)
    for index in range(3):
        found = ledger.lease(f"p{index}", group=4, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=60.0)
        captured = {
            seq: CommitEntry(generation="0-0123456789abcdef", num_bytes=8, line=log.encode(record))
            for seq, record in zip(found.wanted, refs(*found.wanted), strict=True)
        }
        assert ledger.commit(found, captured, log) == list(found.wanted)
    assert ledger.server.ask("EXISTS", ledger.server.key("open")) == 0
