"""How records lie in Redis, and how readers find theirs."""

import random
import struct

import pytest

from lightning_dataflow.contracts import LogRecord, UserError
from lightning_dataflow.control import MAX_ATTEMPTS, ControlPlane, RedisMetadataStore, RunPlan
from lightning_dataflow.control.heads import SEQ
from lightning_dataflow.control.redis import log as redis_channel
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.records import CHUNK, HEAD_BYTES
from tests.records import WIDE, make_ref

COUNTS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3, 2 * CHUNK, 29)


@pytest.fixture
def plane(redis_run) -> ControlPlane:
    log = RedisChannel(redis_run)
    log.announce({"run_id": "run"})
    ledger = RedisMetadataStore(redis_run)
    ledger.begin(RunPlan(start=0, stop=200, window=4), published={}, wanted={}, frontier=0)
    return ControlPlane(run_id="run", ledger=ledger, channel=log, durable=True)


def skip(seq: int) -> LogRecord:
    """Its line has a length of its own."""
    return LogRecord(kind="skip", seq=seq, reason="x" * (1 + seq * 7 % 50))


def lease(plane: ControlPlane, worker: str, group: int, lease_s: float = 60.0):
    return plane.ledger.lease(worker, group=group, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=lease_s)


def publish(plane: ControlPlane, held) -> list[int]:
    return plane.publish(held, {seq: make_ref(seq, held.attempt) for seq in held.wanted})


def test_any_records_are_found_in_any_order(plane):
    seqs = iter(range(200))
    written = [[skip(next(seqs)) for _ in range(count)] for count in COUNTS]
    for records in written:
        plane.log.publish(records)
    records = [record for some in written for record in some]
    rows = plane.log.poll_heads().rows
    assert rows[:, SEQ].tolist() == [record.seq for record in records]
    draw = random.Random(0)
    for _ in range(20):
        chosen = draw.sample(range(len(records)), draw.randrange(1, len(records)))
        assert plane.log.load(rows[chosen]) == [records[index] for index in chosen]
    assert plane.log.load(rows[:0]) == []


def test_what_a_commit_leaves_out_is_not_in_the_log(plane):
    slow = lease(plane, "slow", 29, lease_s=-1)
    fast = lease(plane, "fast", 4)
    assert (slow.wanted, fast.wanted) == (tuple(range(29)), (0, 1, 2, 3))
    assert publish(plane, slow) == list(range(4, 29))
    assert publish(plane, fast) == [0, 1, 2, 3]
    found = plane.log.poll()
    assert [(record.seq, record.ref.origin.attempt) for record in found] == [
        *((seq, 0) for seq in range(4, 29)),
        *((seq, 1) for seq in range(4)),
    ]
    assert plane.ledger.in_flight() == (29, sum(record.ref.num_bytes for record in found))


def test_only_the_skips_of_what_is_given_up_are_in_the_log(plane):
    failing = [seq for seq in range(20) if seq % 3]
    publish(plane, lease(plane, "a", 20))
    generations = {record.seq: record.ref.generation for record in plane.log.poll()}
    for _ in range(MAX_ATTEMPTS - 2):
        assert all(plane.ledger.want(seq, generations[seq]) for seq in failing)
        assert publish(plane, lease(plane, "a", 20)) == failing
        generations |= {record.seq: record.ref.generation for record in plane.log.poll()}
    assert all(plane.ledger.want(seq, generation) for seq, generation in generations.items())
    held = lease(plane, "a", 20)
    assert held.wanted == tuple(range(20))
    plane.give_back(held, "it broke again and again")
    assert plane.log.poll() == [LogRecord(kind="skip", seq=seq, reason="it broke again and again") for seq in failing]
    assert lease(plane, "a", 20).wanted == tuple(seq for seq in range(20) if seq not in failing)


@pytest.mark.parametrize("passed", [0, 1, 3, len(COUNTS) - 1])
def test_what_is_trimmed_leaves_no_lines(plane, redis_run, passed):
    """The last that was read stays."""
    first = 0
    for count in COUNTS:
        plane.log.publish([skip(seq) for seq in range(first, first + count)])
        first += count
    plane.log.poll()
    plane.log.trim(sum(COUNTS[:passed]))
    assert redis_run.ask("XLEN", redis_run.key("index")) == len(COUNTS) - passed
    assert redis_run.ask("HLEN", redis_run.key("lines")) == sum(-(-count // CHUNK) for count in COUNTS[passed:])
    again = RedisChannel(redis_run)
    assert [record.seq for record in again.poll()] == list(range(sum(COUNTS[:passed]), sum(COUNTS)))


def test_a_long_log_is_trimmed_in_slices(plane, redis_run):
    """Redis serves nobody else while it drops some."""
    for seq in range(2300):
        plane.log.publish([skip(seq)])
    while plane.log.poll():
        pass
    plane.log.trim(2250)
    assert redis_run.ask("XLEN", redis_run.key("index")) == redis_run.ask("HLEN", redis_run.key("lines")) == 50
    trims = [
        int(line.split("calls=")[1].split(",")[0])
        for line in redis_run.ask("INFO", "COMMANDSTATS").decode().split()
        if line.startswith("cmdstat_xtrim")
    ]
    assert trims[0] >= 3


def test_a_reader_that_does_not_trim_does_not_grow(plane, redis_run, monkeypatch):
    monkeypatch.setattr(redis_channel, "MAX_READ", 8)
    for first in range(0, 200, 2):
        plane.log.publish([skip(first), skip(first + 1)])
        assert [record.seq for record in plane.log.poll()] == [first, first + 1]
        assert len(plane.log._read) <= 8
    plane.log.trim(150)
    left = [record.seq for record in RedisChannel(redis_run).poll()]
    assert left == list(range(left[0], 200))
    assert 50 <= len(left) <= 100  # what it remembers as one is dropped as one
    plane.log.trim(1000)
    assert redis_run.ask("XLEN", redis_run.key("index")) <= 32


GOOD = (0, 10, 3, 0, 20, 1)  # seq, bytes, tokens, attempt, size, kind


@pytest.mark.parametrize(
    ("entry", "head", "message"),
    [
        ("1-7", (1 << 49, *GOOD[1:]), "no record has the RecordHead"),
        ("1-7", (0, 1 << 62, *GOOD[2:]), "no record has the RecordHead"),
        ("1-7", (0, (1 << 64) - 1, *GOOD[2:]), "no record has the RecordHead"),
        ("1-7", (0, 0, *GOOD[2:]), "no record has the RecordHead"),
        ("1-7", (0, 10, 4_000_000_000, *GOOD[3:]), "no record has the RecordHead"),
        ("1-7", (*GOOD[:3], 4_000_000_000, *GOOD[4:]), "no record has the RecordHead"),
        ("1-7", (*GOOD[:4], 0, 1), "no record has the RecordHead"),
        ("1-7", (*GOOD[:4], 1 << 31, 1), "no record has the RecordHead"),
        ("1-7", (*GOOD[:5], 5), "no record has the RecordHead"),
        ("1-7", (*GOOD[:5], 3), "no record has the RecordHead"),  # a skip has no bytes
        ("0-7", GOOD, "record 0: its number does not follow"),
        (f"{(1 << 63) - 5}-7", GOOD, "its number does not follow"),
        (f"{(1 << 64) - 5}-7", GOOD, "its number does not follow"),
    ],
)
def test_a_head_that_no_record_has_is_refused(plane, redis_run, entry, head, message):
    redis_run.ask("XADD", redis_run.key("index"), entry, "h", struct.pack("<QQIIIB3x", *head))
    with pytest.raises(UserError, match=message):
        plane.log.poll_heads()


def test_entries_do_not_overlap(plane, redis_run):
    for entry in ("5-7", "6-7"):
        redis_run.ask("XADD", redis_run.key("index"), entry, "h", 2 * struct.pack("<QQIIIB3x", *GOOD))
    with pytest.raises(UserError, match="record 6: its number does not follow 6"):
        plane.log.poll_heads()


def held_leases(redis_run) -> list[int]:
    return [redis_run.ask("ZCARD", redis_run.key("leased")), redis_run.ask("HLEN", redis_run.key("holders"))]


def test_a_lease_whose_samples_are_gone_is_over_with_its_commit(plane, redis_run):
    held = lease(plane, "a", 4)
    plane.ledger.free(held.wanted)
    assert held_leases(redis_run) == [1, 1]
    assert publish(plane, held) == []
    assert held_leases(redis_run) == [0, 0]


def test_a_heartbeat_does_not_keep_a_lease_whose_samples_are_gone(plane, redis_run):
    lease(plane, "a", 4)
    gone = lease(plane, "a", 4)
    plane.ledger.free(gone.wanted)
    plane.ledger.renew("a", 60.0)
    assert held_leases(redis_run) == [1, 1]


def test_a_lease_that_was_taken_over_is_over(plane, redis_run):
    late = lease(plane, "a", 4, lease_s=-1)
    assert publish(plane, lease(plane, "b", 4)) == list(late.wanted)
    assert publish(plane, late) == []
    assert held_leases(redis_run) == [0, 0]


def test_a_head_has_a_fixed_size(plane):
    record = plane.log.encode(skip(5))
    assert record[HEAD_BYTES:].startswith(b'{"kind":"skip","seq":5,')
