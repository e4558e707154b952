"""A Redis that restarts, stops, fails over or is full."""

import shutil
import signal
import threading
import time

import pytest

from lightning_dataflow.contracts import CapacityError, PeerFailedError, PeerTimeoutError
from lightning_dataflow.control.redis import address as redis_address
from lightning_dataflow.control.redis.server import RedisServer
from tests.unit.control.redis.calls import begun, channel, kill, lease, refs, seqs

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)


@pytest.mark.integration
def test_all_goes_on_after_a_restart_with_the_append_only_file(own):
    server = own("appendfsync always")
    log = channel(server)
    log.announce({"run_id": "run"})
    ledger = begun(log.server)
    held = lease(ledger)
    log.publish(refs(0, 1))
    assert seqs(log) == [0, 1]
    kill(server)
    publishing = threading.Thread(target=log.publish, args=(refs(2),))
    publishing.start()
    time.sleep(0.5)
    assert publishing.is_alive()  # waiting for it
    server.start()
    publishing.join(10)
    assert seqs(log) == [2]
    assert lease(ledger).seqs == (4, 5, 6, 7)
    assert held.seqs == (0, 1, 2, 3)


def test_a_restart_without_it_is_told(own):
    server = own("appendonly no")
    writer, reader, idle = channel(server), channel(server), channel(server)
    writer.announce({"run_id": "run"})
    writer.publish(refs(0, 1))
    assert seqs(reader) == [0, 1]
    kill(server)
    server.start()
    why = r": it restarted without its append-only file, or failed over .* Set appendonly yes .*ckpt_path=last"
    for _ in range(2):
        with pytest.raises(PeerFailedError, match="lost what this process had written there" + why):
            writer.publish(refs(2))
        with pytest.raises(PeerFailedError, match="lost record 2 of run run, which was read" + why):
            reader.poll()
    assert idle.poll() == []  # it had written and read nothing
    idle.publish(refs(0))


@pytest.mark.integration
def test_a_replica_that_is_behind_is_told_to_whom_it_concerns(own):
    """The last changes are missing, and others went on from there under the same numbers."""
    server, replica = own(), own()
    first, second, reader = channel(server), channel(server), channel(server)
    first.announce({"run_id": "run"})
    first.publish(refs(0))
    second.publish(refs(1))
    asks = RedisServer(replica.where, "run")
    asks.ask("CONFIG", "SET", "masterauth", server.where.password)
    asks.ask("REPLICAOF", "127.0.0.1", server.port)
    while asks.ask("DBSIZE") < 4 or b"master_link_status:up" not in asks.ask("INFO", "replication"):
        time.sleep(0.02)
    asks.ask("REPLICAOF", "NO", "ONE")
    second.publish(refs(2))
    assert seqs(reader) == [0, 1, 2]
    kill(server)
    for one in (first, second, reader):  # what a name in DNS does
        one.server.where = replica.where
        one.server._pool = one.server.where.connection_pool("replica")
    first.publish(refs(3))
    with pytest.raises(PeerFailedError, match="lost what this process had written there"):
        second.publish(refs(4))
    with pytest.raises(PeerFailedError, match="lost record 3 of run run, which was read"):
        reader.poll()


def test_a_lost_record_is_noticed_where_its_reader_comes_upon_a_change_that_was_tried_again(own):
    """The change has the same number for one of its records in both histories, and other records there."""
    server = own()
    log, other, reader = channel(server), channel(server), channel(server)
    log.announce({"run_id": "run"})
    log.publish(refs(0))
    kept = {key: log.server.ask("DUMP", key) for key in log.server.keys if log.server.ask("EXISTS", key)}
    other.publish(refs(1))
    log.publish(refs(2, 3))
    assert [record.seq for record in reader.poll(3)] == [0, 1, 2]
    for key, value in kept.items():  # a replica that is behind takes over
        log.server.ask("RESTORE", key, 0, value, "REPLACE")
    log.server._request, log.server._acked = log.server._request - 1, log.server._acked - 1  # its answer was lost, too
    log.publish(refs(2, 3))
    with pytest.raises(PeerFailedError, match="lost record 3 of run run, which was read"):
        reader.poll()


@pytest.mark.integration
def test_while_somebodys_script_runs_for_long_others_wait(own):
    server = own("busy-reply-threshold 100")
    log = channel(server)
    log.announce({"run_id": "run"})
    asks = RedisServer(server.where, "other")
    script = "local t = redis.call('TIME')[1] while redis.call('TIME')[1] - t < 2 do end"
    busy = threading.Thread(target=asks.ask, args=("EVAL", script, 0))
    busy.start()
    time.sleep(0.3)
    start = time.monotonic()
    log.publish(refs(0))
    assert seqs(log) == [0]
    assert time.monotonic() - start > 0.5
    busy.join(10)


@pytest.mark.integration
def test_a_change_whose_answer_is_lost_is_made_once(own, monkeypatch):
    server = own()
    monkeypatch.setattr(redis_address, "ANSWER_S", 0.2)
    log = channel(server)
    log.announce({"run_id": "run"})
    ledger = begun(log.server)
    lease(ledger)
    process = server.process
    process.send_signal(signal.SIGSTOP)  # what is sent now arrives, and nothing comes back
    threading.Timer(1.0, process.send_signal, [signal.SIGCONT]).start()
    start = time.monotonic()
    log.publish(refs(0))
    assert time.monotonic() - start > 0.9
    process.send_signal(signal.SIGSTOP)
    threading.Timer(1.0, process.send_signal, [signal.SIGCONT]).start()
    assert lease(ledger).seqs == (4, 5, 6, 7)
    assert lease(ledger).seqs == (8, 9, 10, 11)
    assert seqs(log) == [0]
    assert channel(server).poll() == [record for record in channel(server).poll()]


@pytest.mark.integration
def test_patience_ends_with_a_message(own):
    server = own()
    log = channel(server, patience_s=0.3)
    log.announce({"run_id": "run"})
    kill(server)
    with pytest.raises(PeerTimeoutError, match=r"Redis at 127.0.0.1:\d+ could not be used for 0 s \(.*\): is it running"):
        log.publish(refs(0))
    server.start()
    log.publish(refs(1))
    assert seqs(log) == [1]


def test_a_full_memory_refuses_what_needs_more_and_lets_others_free(own):
    server = own()
    log = channel(server)
    log.announce({"run_id": "run"})
    ledger = begun(log.server)
    for at in range(0, 100, 4):
        log.publish(refs(*range(at, at + 4)))
    held = lease(ledger)
    log.server.ask("CONFIG", "SET", "maxmemory", 1 << 20)
    with pytest.raises(CapacityError, match=r"Redis at .* has no memory left: raise its maxmemory, .*flow clean"):
        log.publish(refs(100))
    with pytest.raises(CapacityError, match="has no memory left"):
        lease(ledger)
    assert ledger.give_back(held, dict.fromkeys(held.wanted, b""), log, True) == []
    ledger.report("trainer-0", "training")
    ledger.ack(4, 1, held.wanted)
    while log.poll():
        pass
    log.trim(90)
    assert len(channel(server).poll()) < 20
    log.server.ask("CONFIG", "SET", "maxmemory", 0)
    log.publish(refs(100))
    assert lease(ledger) is not None
