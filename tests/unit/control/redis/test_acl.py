"""The user of docs/redis.md: all that this package sends is allowed, and nothing that harms or shows what is others'."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

import lightning_dataflow
from lightning_dataflow.cli import clean, status
from lightning_dataflow.cli.redis_runs import runs_at
from lightning_dataflow.control import MAX_ATTEMPTS, RedisMetadataStore
from lightning_dataflow.control.redis.address import RedisAddress
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.services.redis import LocalRedis
from tests.records import failures
from tests.unit.control.ledgers import begin, commit, generation, give_back, lease
from tests.unit.control.redis.calls import refs, seqs

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)

DOCS = Path(__file__).parents[4] / "docs" / "redis.md"
PASSWORD = "right"
ENABLED = ("enable-debug-command yes", "enable-module-command yes")  # so that nothing but the user's rights refuses them
REFUSED = """
FLUSHALL
FLUSHDB
SWAPDB 0 1
MIGRATE 127.0.0.1 9 ldf:x 0 10
RESTORE ldf:x 0 x
KEYS *
RANDOMKEY
DBSIZE
SELECT 1
MOVE ldf:x 1
COPY ldf:x ldf:y DB 1
SORT ldf:x
SORT_RO ldf:x
CLIENT LIST
CLIENT KILL TYPE normal
CLIENT PAUSE 1
CLIENT UNPAUSE
CLIENT UNBLOCK 1
CLIENT NO-EVICT on
CLIENT TRACKING on BCAST
CONFIG GET *
CONFIG SET maxmemory 1
CONFIG REWRITE
DEBUG SLEEP 0
SHUTDOWN NOSAVE
SAVE
BGSAVE
BGREWRITEAOF
LASTSAVE
MONITOR
SYNC
PSYNC ? -1
REPLICAOF NO ONE
FAILOVER
ROLE
CLUSTER INFO
MODULE LIST
MODULE LOAD /tmp/x.so
LATENCY LATEST
SLOWLOG GET
MEMORY STATS
MEMORY DOCTOR
MEMORY PURGE
ACL LIST
ACL SETUSER ldf +@all
ACL WHOAMI
ACL LOG
SCRIPT FLUSH
SCRIPT KILL
SCRIPT LOAD x
FUNCTION FLUSH
FUNCTION LIST
FUNCTION DUMP
FUNCTION LOAD x
FCALL f 0
FCALL_RO f 0
PUBLISH ldf:x x
SUBSCRIBE ldf:x
MULTI
PFDEBUG ENCODING ldf:x
""".strip().splitlines()
FOREIGN = """
GET other:tenant
SET other:tenant x
DEL other:tenant
TTL other:tenant
TYPE other:tenant
DUMP other:tenant
OBJECT ENCODING other:tenant
MEMORY USAGE other:tenant
RENAME other:tenant ldf:x
RENAME ldf:x other:tenant
MGET ldf:x other:tenant
SDIFFSTORE ldf:x other:tenant
XREAD STREAMS other:tenant 0
GET ldfx
""".strip().splitlines()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LocalRedis]:
    (line,) = (line for line in DOCS.read_text().splitlines() if line.startswith("user ldf "))
    line = line.replace("SHA256_OF_THE_PASSWORD", hashlib.sha256(PASSWORD.encode()).hexdigest())
    one_run = line.replace("user ldf ", "user one ").replace("~ldf:*", "~ldf:{mine}:*")
    with LocalRedis(tmp_path_factory.mktemp("redis"), settings=(line, one_run, *ENABLED)) as made:
        yield made


@pytest.fixture
def where(server) -> RedisAddress:
    """As the user of the documentation."""
    return replace(server.where, username="ldf", password=PASSWORD)


@pytest.fixture
def root(server) -> RedisServer:
    """As one who may do everything; beside our keys there is one of somebody else's."""
    made = RedisServer(server.where, "root")
    for command in ("FLUSHALL", "SET other:tenant theirs", "ACL LOG RESET", "CONFIG RESETSTAT"):
        made.ask(*command.split())
    return made


@pytest.fixture
def user(server) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port, username="ldf", password=PASSWORD, single_connection_client=True) as client:
        client.ping()
        yield client


def commands_in_the_source() -> set[str]:
    """What may be a command; LocalRedis is the user of its own server."""
    package = Path(lightning_dataflow.__file__).parent
    texts = [path.read_text() for path in package.rglob("*.lua")]
    texts += [path.read_text() for path in package.rglob("*.py") if "services" not in path.parts]
    return {name.lower() for text in texts for name in re.findall(r"""[(\[]\s*['"]([A-Z]{3,})['"]""", text)}


def a_whole_life(where: RedisAddress, run: str) -> None:
    """Every operation of a log and of a ledger."""
    log = RedisChannel(RedisServer(where, run))
    log.announce({"run_id": "run"})
    ledger = RedisMetadataStore(RedisServer(where, run))
    assert ledger.claim("trainer-0", "beginning", None)
    ledger.join()
    assert ledger.is_ours()
    assert ledger.fence() == {}
    begin(ledger)
    ledger.report("producer-0", "it broke", failed=True)
    assert failures(ledger) == ["producer-0: it broke"]
    ledger.report("producer-0", "capturing")
    lease(ledger, "one that died", lease_s=-1)
    first, second = lease(ledger), lease(ledger, "b")
    ledger.renew("a", 60.0)
    assert commit(ledger, first) == [0, 1, 2, 3]
    for _ in range(MAX_ATTEMPTS - 1):
        assert give_back(ledger, second) == []
        second = lease(ledger, "b")
    assert give_back(ledger, second) == [4, 5, 6, 7]
    assert ledger.want(0, generation(first, 0))
    ledger.free([1])
    ledger.ack(4, 1, [2])
    ledger.ack_durable(4, 1)
    ledger.count_wait()
    assert ledger.in_flight()[0] == 2
    assert ledger.now() > 0
    assert ledger.plan() is not None
    log.publish(refs(8))
    log.server._pool.disconnect()  # the next call connects again
    assert seqs(log) == [*range(8), 8]
    log.trim(6)
    ledger.finish("interrupted")
    assert ledger.finished() == "interrupted"


def test_all_that_we_send_is_allowed(server, where, root, tmp_path, capsys):
    a_whole_life(where, "run")
    secret = tmp_path / "secret"
    secret.write_text(PASSWORD)
    secret.chmod(0o600)
    there = ["--redis", where.address, "--redis-username", "ldf", "--redis-secret-file", str(secret)]
    status.main(there)
    status.main(["run", *there, "--interval=0"])
    assert "interrupted" in capsys.readouterr().out
    clean.main(["run", *there])
    assert capsys.readouterr().out.startswith("removed run run: ")
    completed = RedisMetadataStore(RedisServer(where, "completed"))
    begin(completed)
    completed.finish("completed")
    completed.close()
    assert runs_at(where) == []
    assert root.ask("ACL", "LOG") == []  # nothing was refused
    known = {name.decode() for name in root.ask("COMMAND", "LIST")}
    sent = set(re.findall(r"cmdstat_([a-z]+)", root.ask("INFO", "commandstats").decode()))
    assert known & commands_in_the_source() - sent == set()


def test_a_user_of_one_run(server, root):
    where = replace(server.where, username="one", password=PASSWORD)
    a_whole_life(where, "mine")
    with pytest.raises(PermissionError, match="refuses this user"):
        RedisChannel(RedisServer(where, "yours"))


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_the_servers_is_refused(root, user, command):
    root.ask("SET", "ldf:x", "ours")
    name = command.split()[0].lower()
    with pytest.raises(
        redis.exceptions.NoPermissionError, match=rf"no permissions to run the '{name}(\|[a-z-]+)?' command"
    ):
        user.execute_command(*command.split())
    with pytest.raises(
        redis.exceptions.ResponseError, match=r"can't run this command|not allowed from script|NOPERM|Unknown"
    ):
        user.eval("return redis.call(unpack(ARGV))", 0, *command.split())
    assert root.ask("MGET", "other:tenant", "ldf:x") == [b"theirs", b"ours"]


@pytest.mark.parametrize("command", FOREIGN)
def test_keys_of_others_are_refused(root, user, command):
    root.ask("SET", "ldf:x", "ours")
    with pytest.raises(redis.exceptions.NoPermissionError, match="no permissions to access one of the keys"):
        user.execute_command(*command.split())
    with pytest.raises(redis.exceptions.ResponseError, match="can't access at least one of the keys"):
        user.eval("return redis.call(unpack(ARGV))", 0, *command.split())
    assert root.ask("MGET", "other:tenant", "ldf:x") == [b"theirs", b"ours"]
