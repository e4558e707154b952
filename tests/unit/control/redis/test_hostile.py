"""Another client of the same Redis writes odd values under the keys of a run: each reader ends with one line."""

import json
import shutil
from datetime import date

import orjson
import pytest

from lightning_dataflow.contracts import PeerFailedError, UserError
from lightning_dataflow.control import RedisMetadataStore
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer
from tests.records import make_ref
from tests.unit.control.redis.calls import begun, lease

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")

DEEP = b'{"a":' + b"[" * 100_000


@pytest.fixture
def run(redis_run):
    """(server, ledger, log) of a run that has begun, on which a producer has reported."""
    log = RedisChannel(redis_run)
    log.announce({"run_id": "run"})
    ledger = begun(redis_run)
    ledger.report("producer-0", "capturing")
    return redis_run, ledger, log


def refusal(act) -> str:
    with pytest.raises((UserError, PeerFailedError)) as error:
        act()
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 600
    assert text.isprintable()
    return text


def write(server: RedisServer, key: str, *command) -> None:
    verb, *rest = command
    server.ask(verb, server.key(key), *rest)


def report(**changes) -> str:
    part = {"host": "h", "pid": 1, "pids": "", "state": "", "failed": False, "fatal": False, "seen": 1}
    return json.dumps(part | changes)


def ref_line(**changes) -> bytes:
    return orjson.dumps({"kind": "ref", "seq": 0, "ref": make_ref(0)}) if not changes else orjson.dumps(changes)


@pytest.mark.parametrize(
    "fields",
    [
        ("a", ""),
        ("record", ""),
        ("record", b"\xff"),
        ("record", "1"),
        ("record", DEEP),
        ("record", '{"kind":"begin","seq":NaN}'),
        ("record", orjson.dumps({"kind": "begin", "seq": 2**63})),
        ("record", orjson.dumps({"kind": "skip", "seq": 0, "reason": ""})),
        ("record", orjson.dumps({"kind": "ref", "seq": 0, "ref": {"origin": {"capture": ["x"]}, "schema_version": {}}})),
        ("record", orjson.dumps({"kind": "\x1b]0;x\x07", "seq": 0})),
        ("record", b"x" * (2 << 20)),
        ("a", "1", "b", "2"),
    ],
    ids=range(12),
)
def test_the_log(run, fields):
    server, _, log = run
    write(server, "log", "XADD", "1-1", *fields)
    assert "record 1" in refusal(log.poll)


@pytest.mark.parametrize(
    ("name", "value", "calls"),
    [
        ("plan", "{", "plan status lease"),
        ("plan", "{}", "plan status lease"),
        ("plan", DEEP, "plan status lease"),
        ("plan", "7", "plan status lease"),
        ("plan", '{"start":-1,"stop":8,"window":0}', "plan status"),
        ("plan", '{"start":0,"stop":1e300,"window":1}', "plan status"),
        ("plan", '{"start":"x","stop":8,"window":1}', "plan status lease"),
        ("bytes_in_flight", "x", "status lease in_flight"),
        ("bytes_in_flight", "1e300", "status in_flight"),
        ("trained_seq", "x", "status lease"),
        ("frontier", "-4", "lease"),
        ("frontier", "0.5", "status lease"),
        ("frontier", "\x1b[2J", "status lease"),
        ("finished_at", "abc", "finished"),
    ],
)
def test_totals(run, name, value, calls):
    server, ledger, _ = run
    write(server, "totals", "HSET", name, value)
    acts = {"lease": lambda: lease(ledger)}
    for call in calls.split():
        assert name in refusal(acts.get(call) or getattr(ledger, call))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        DEEP,
        report(host=1),
        report(pid="x"),
        report(pid=1 << 40),
        report(pid=-1),
        report(seen="now"),
        report(seen=10**400),
        report(seen=float("nan")),
    ],
    ids=range(11),
)
def test_reports(run, text):
    server, ledger, _ = run
    write(server, "parts", "HSET", "evil\x1b[31m", text)
    assert "report of evil\\x1b[31m" in refusal(ledger.parts)
    assert "report of" in refusal(ledger.status)


@pytest.mark.parametrize("text", ["{", "[]", DEEP, '{"state":"x","attempt":0,"tries":0,"bytes":"many"}'], ids=range(4))
def test_rows_of_samples(run, text):
    server, ledger, _ = run
    write(server, "samples", "HSET", "0", text)
    write(server, "open", "ZADD", "0", "0")
    write(server, "totals", "HSET", "frontier", "4")
    for act in (ledger.status, lambda: lease(ledger), ledger.fence):
        assert "row of sample 0" in refusal(act)


@pytest.mark.parametrize("field", ["abc", "²", "-1", "9" * 5000], ids=range(4))
def test_rows_of_what_is_no_seq(run, field):
    server, ledger, _ = run
    write(server, "samples", "HSET", field, '{"state":"wanted","attempt":0,"tries":0,"bytes":0}')
    assert "row of sample" in refusal(ledger.status)


@pytest.mark.parametrize("key", ["card", "nonce", "log", "totals", "clients", "samples", "open", "parts", "date"])
def test_keys_of_another_type(run, key):
    server, ledger, log = run
    server.ask("DEL", server.key(key))
    server.ask(
        "HSET" if key in ("card", "nonce", "date") else "SET",
        server.key(key),
        *(("a", "x") if key in ("card", "nonce", "date") else ("x",)),
    )
    acts = {"card": log.card, "nonce": log.nonce, "log": log.poll, "parts": ledger.parts, "samples": ledger.status}
    acts["date"] = lambda: log.first_day(date.today())
    refusal(acts.get(key, lambda: lease(ledger)))


@pytest.mark.parametrize("text", ["{}", "[]", DEEP, b"\xff\xff", '{"schema_version":3,"run_id":"\x1b[2J"}'], ids=range(5))
def test_cards(run, text):
    server, _, log = run
    server.ask("SET", server.key("card"), text)
    for act in (lambda: RedisChannel(server), log.card, lambda: log.announce({"run_id": "run"})):
        assert "card" in refusal(act)


@pytest.mark.parametrize("key", ["card", "nonce", "totals", "samples", "parts"])
def test_a_value_that_is_too_large_is_not_fetched(run, monkeypatch, key):
    server, ledger, log = run
    monkeypatch.setattr("lightning_dataflow.control.redis.server.MAX_REPLY_BYTES", 4096)
    command = ("SET",) if key in ("card", "nonce") else ("HSET", "bytes_in_flight")
    write(server, key, *command, "1" * 5000)
    acts = {"card": log.card, "nonce": log.nonce, "totals": ledger.in_flight, "parts": ledger.parts}
    for act in (acts.get(key, ledger.status), *([ledger.plan] if key == "totals" else [])):
        assert f"{server.key(key)} (too large) is damaged" in refusal(act)


def test_a_row_that_is_too_large_is_not_parsed(run):
    server, ledger, _ = run
    row = {"state": "wanted", "attempt": 0, "tries": 0, "bytes": 0, "more": "x" * (1 << 20)}
    write(server, "samples", "HSET", "0", orjson.dumps(row))
    write(server, "open", "ZADD", "0", "0")
    assert "row of sample 0" in refusal(ledger.fence)


def test_a_bounded_read_gives_what_the_command_gives(run):
    server, _, _ = run
    for verb, key, *rest in (
        ("GET", "card"),
        ("GET", "nothing"),
        ("HGET", "totals", "frontier"),
        ("HGET", "totals", "nothing"),
        ("HLEN", "totals"),
        ("HGETALL", "totals"),
        ("HGETALL", "nothing"),
        ("XRANGE", "log", "-", "+", "COUNT", 5),
    ):
        command = (verb, server.key(key), *rest)
        assert server.read(*command) == server.ask(*command)


def test_a_nonce_that_is_no_name(run):
    server, _, log = run
    server.ask("SET", server.key("nonce"), "../../\x1b")
    assert "the nonce of" in refusal(log.nonce)


@pytest.mark.parametrize("field", ["host", "pids"])
def test_long_names_in_a_report_are_cut(run, field):
    server, ledger, _ = run
    write(server, "parts", "HSET", "producer-9", report(**{field: "x" * 10_000}))
    (mine,) = (part for part in ledger.parts() if part["name"] == "producer-9")
    assert len(mine[field]) == 2000


def test_forged_last_words_are_data(run):
    server, _, _ = run
    ledger = RedisMetadataStore(server)
    ledger.report("producer-9", "\x1b]0;title\x07 pwn" + "x" * 10_000, failed=True)
    (mine,) = (part for part in ledger.parts() if part["name"] == "producer-9")
    assert len(mine["state"]) == 2000
