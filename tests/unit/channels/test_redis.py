"""Redis when it dies, forgets, is full, stands still, or is none."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_dataflow.channels import LocalRedis, RedisAddress, RedisChannel, redis_connections, redis_server
from lightning_dataflow.channels.redis_server import RedisServer
from lightning_dataflow.contracts import CapacityError, LogRecord, PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.control import Captured, RedisMetadataStore, RunPlan
from tests.streams import WIDE, make_ref

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)


@pytest.fixture
def own(tmp_path):
    """Starts a Redis for this test, with settings."""
    made: list[LocalRedis] = []

    def start(*settings: str) -> LocalRedis:
        made.append(LocalRedis(tmp_path / f"redis-{len(made)}", settings=settings))
        return made[-1]

    yield start
    for one in made:
        one.close()


def kill(server: LocalRedis) -> None:
    process = server.processes["redis-server"]
    process.kill()
    process.wait()


def channel(server: LocalRedis, **options: float) -> RedisChannel:
    return RedisChannel(RedisServer(server.where, "run", **options))


def refs(*seqs: int) -> list[LogRecord]:
    return [LogRecord(kind="ref", seq=seq, ref=make_ref(seq)) for seq in seqs]


def seqs(log: RedisChannel) -> list[int]:
    return [record.seq for record in log.poll()]


def begun(server: RedisServer) -> RedisMetadataStore:
    ledger = RedisMetadataStore(server)
    ledger.begin(RunPlan(start=0, stop=100, window=4), published={}, wanted={}, frontier=0)
    return ledger


def lease(ledger: RedisMetadataStore):
    return ledger.lease("a", group=4, num_bytes=lambda seq: 10, watermarks=WIDE, lease_s=60.0)


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
    server.restart("redis-server")
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
    server.restart("redis-server")
    why = r": it restarted without its append-only file, or failed over .* Set appendonly yes .*ckpt_path=last"
    for _ in range(2):
        with pytest.raises(PeerFailedError, match="lost what this process had written there" + why):
            writer.publish(refs(2))
        with pytest.raises(PeerFailedError, match="lost record 1 of run run, which was read" + why):
            reader.poll()
    assert idle.poll() == []  # it had written and read nothing
    idle.publish(refs(0))


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
        one.server._connections = one.server._connect()
    first.publish(refs(3))
    with pytest.raises(PeerFailedError, match="lost what this process had written there"):
        second.publish(refs(4))
    with pytest.raises(PeerFailedError, match="lost record 3 of run run, which was read"):
        reader.poll()


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


def test_a_change_whose_answer_is_lost_is_made_once(own, monkeypatch):
    server = own()
    monkeypatch.setattr(redis_connections, "ANSWER_S", 0.2)
    log = channel(server)
    log.announce({"run_id": "run"})
    ledger = begun(log.server)
    lease(ledger)
    process = server.processes["redis-server"]
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


def test_patience_ends_with_a_message(own):
    server = own()
    log = channel(server, patience_s=0.3)
    log.announce({"run_id": "run"})
    kill(server)
    with pytest.raises(PeerTimeoutError, match=r"Redis at 127.0.0.1:\d+ could not be used for 0 s \(.*\): is it running"):
        log.publish(refs(0))
    server.restart("redis-server")
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
    assert ledger.give_back(held, dict.fromkeys(held.wanted, b""), log) == []
    ledger.report("trainer-0", "training")
    ledger.ack(4, 1, held.wanted)
    while log.poll():
        pass
    log.trim(90)
    assert len(channel(server).poll()) < 20
    log.server.ask("CONFIG", "SET", "maxmemory", 0)
    log.publish(refs(100))
    assert lease(ledger) is not None


def test_the_wrong_password_and_a_user_that_may_not(own):
    user = "~ldf:* resetchannels -@all +@read +@write +@scripting +@connection +info +time"
    server = own("user ldf on >right " + user, "user small on >right ~ldf:* -@all +@connection +info")
    for wrong in (None, "wrong"):
        with pytest.raises(PermissionError, match=r"refuses this user \(.*\): check channel.username and the pass"):
            RedisServer(replace(server.where, password=wrong), "run")
    with pytest.raises(PermissionError, match=r"refuses this user .*docs/redis.md lists what"):
        RedisChannel(RedisServer(replace(server.where, username="small", password="right"), "run"))
    log = RedisChannel(RedisServer(replace(server.where, username="ldf", password="right"), "run"))
    log.announce({"run_id": "run"})
    ledger = begun(log.server)
    assert ledger.now() > 0
    assert lease(ledger) is not None
    assert ledger.status()["leased"] == 4
    log.publish(refs(0))
    assert seqs(log) == [0]
    assert "right" not in repr(log.server.where)


def test_an_address_without_a_redis():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]

        def answer() -> None:
            connection, _ = silent.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match=rf"no Redis answers at 127.0.0.1:{port} \(.*\): start one there, or correct"):
            RedisServer(RedisAddress(address=f"127.0.0.1:{port}"), "run")
    with pytest.raises(UserError, match=rf"no Redis answers at 127.0.0.1:{port} \(.*refused.*\): start one there"):
        RedisServer(RedisAddress(address=f"127.0.0.1:{port}"), "run")
    for wrong in ("localhost", ":1", "a:b"):
        with pytest.raises(UserError, match=f"channel.address={wrong} is no host:port: give both"):
            RedisServer(RedisAddress(address=wrong), "run")


def test_a_redis_that_is_too_old_or_evicts(own, tmp_path, monkeypatch):
    server = own()
    RedisServer(server.where, "run").ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(UserError, match=r"drops keys when .* \(maxmemory-policy allkeys-lru\).* set maxmemory-policy noev"):
        RedisServer(server.where, "run")
    program = Path(shutil.which("redis-server"))
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split("v=")[1].split()[0]
    older = tmp_path / "redis-server"  # the same, but that it says another version
    older.write_bytes(program.read_bytes().replace(version.encode() + b"\0", ("5" + version[1:]).encode() + b"\0"))
    older.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(redis_server, "OLDEST", (5, 0))
    old = own()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"Redis at .* has version 5\.\S+, needed is 7\.0 or newer: upgrade it"):
        RedisServer(old.where, "run")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls(own, tmp_path):
    name = ("-subj", "/CN=ldf", "-addext", "subjectAltName=IP:127.0.0.1", "-nodes", "-newkey", "rsa:2048", "-days", "2")
    for one in ("server", "other"):
        openssl(tmp_path, "req", "-x509", *name, "-keyout", f"{one}.key", "-out", f"{one}.crt")
    certificate, key = str(tmp_path / "server.crt"), str(tmp_path / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = own(
        f"tls-port {port}", f"tls-cert-file {certificate}", f"tls-key-file {key}", f"tls-ca-cert-file {certificate}"
    )
    where = replace(
        server.where, address=f"127.0.0.1:{port}", tls=True, ca_file=certificate, cert_file=certificate, key_file=key
    )
    log = RedisChannel(RedisServer(where, "run"))
    log.announce({"run_id": "run"})
    log.publish(refs(0))
    assert seqs(log) == [0]
    wrong = (
        replace(where, tls=False),
        replace(server.where, tls=True),
        replace(where, ca_file=str(tmp_path / "other.crt")),
        replace(where, cert_file=None, key_file=None),
    )
    for one in wrong:
        with pytest.raises(UserError, match=r"no Redis answers at .* or correct channel.address or channel.tls "):
            RedisServer(one, "run")
    with pytest.raises(UserError, match=r"channel.ca_file=nowhere: there is no such file"):
        RedisServer(replace(where, ca_file="nowhere"), "run")


def test_what_others_write_is_checked(own):
    log = channel(own())
    log.announce({"run_id": "run"})
    index, lines = log.server.key("index"), log.server.key("lines")
    good = log.encode(refs(1)[0])

    def write(number: int, head: bytes, line: bytes) -> None:
        log.server.ask("HSET", lines, number, line)
        log.server.ask("XADD", index, f"{number}-7", "h", head)

    for number, (head, line, message) in enumerate(
        (
            (good[:31], good[32:], "31 bytes of heads are no whole number"),
            (good[:28] + b"\xff" + good[29:32], good[32:], r"no record has the RecordHead\(.*seq=1, .* kind=255"),
            (good[:32], b"{", "is damaged in record 3: "),
            (good[:32], log.encode(refs(2)[0])[32:], "it is the ref of seq 2"),
            (good[:8] + b"\1" + good[9:32], good[32:], "its head tells"),
        ),
        1,
    ):
        write(number, head, line)
        with pytest.raises(UserError, match=message):
            log.poll()
        log._position = (number, 7)
    for card in (b"{", b"[]", b"{}"):
        log.server.ask("SET", log.server.key("card"), card)
        with pytest.raises(UserError, match=r"the card of .* is damaged .* another run_name"):
            log.card()
    log.server.ask("SET", log.server.key("card"), b'{"run_id": "run", "schema_version": 7}')
    with pytest.raises(UserError, match="has schema version 7, this release reads 2"):
        log.card()


def test_two_servers_do_not_share_a_folder(own, monkeypatch):
    server = own()
    monkeypatch.setattr("lightning_dataflow.channels.redis_local.STOP_TIMEOUT_S", 0.1)
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
    assert asks.ask("DBSIZE") > 3  # for a resume
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
        part = {"host": "h", "pid": index, "pids": "p", "seen": "1000.0", "state": "capturing", "failed": index % 2}
        asks.ask("HSET", asks.key("parts"), f"producer-{index}", json.dumps(part))
        asks.ask("HSET", asks.key("failed"), f"producer-{index}", "it broke")
        leased = ledger.lease(f"producer-{index}", group=4, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=-1)
        assert leased.seqs == (0, 1, 2, 3)
    other = channel(server)
    other.publish(refs(0))
    assert asks.ask("HLEN", asks.key("clients")) == 2
    ledger.report("producer-new", "capturing")
    assert [part["name"] for part in ledger.status()["parts"]] == ["producer-new"]
    assert ledger.failures() == []
    assert asks.ask("HLEN", asks.key("holders")) == asks.ask("ZCARD", asks.key("leased")) == 2
    asks.ask("HSET", asks.key("clients"), "dead", "3 1000 true")
    ledger.finish("completed")
    other.server.leave()
    ledger.close()
    assert asks.ask("DBSIZE") == 0


def test_what_is_said_after_the_end_does_not_stay(own):
    """Nor does a key that only a producer's last words make."""
    server = own()
    log = channel(server)
    ledger, dead, asks = begun(log.server), channel(server), RedisServer(server.where, "run")
    dead.publish(refs(0))
    ledger.finish("completed")
    ledger.report("producer-0", "it broke", failed=True)
    ledger.close()
    times = {name: asks.ask("TTL", asks.key(name)) for name in ("totals", "lines", "clients", "parts", "failed")}
    assert all(3500 < seconds <= 3600 for seconds in times.values()), times


def test_workers_that_hold_nothing_leave_no_trace(own):
    ledger = begun(channel(own()).server)
    log = RedisChannel(ledger.server)
    for index in range(3):
        found = ledger.lease(f"p{index}", group=4, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=60.0)
        captured = {
            seq: Captured(generation="0-0123456789abcdef", num_bytes=8, line=log.encode(record))
            for seq, record in zip(found.wanted, refs(*found.wanted), strict=True)
        }
        assert ledger.commit(found, captured, log) == list(found.wanted)
    assert ledger.server.ask("EXISTS", ledger.server.key("holders")) == 0
