"""What changes in Redis with each operation, and what a look costs."""

import pytest

from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.control import MAX_ATTEMPTS, ControlPlane, RedisMetadataStore, RunPlan
from lightning_dataflow.control.leases import Sample
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer
from tests.records import WIDE, make_ref


@pytest.fixture
def plane(redis_run) -> ControlPlane:
    log = RedisChannel(redis_run)
    log.announce({"run_id": "run"})
    ledger = RedisMetadataStore(redis_run)
    ledger.begin(RunPlan(start=0, stop=200, window=4), {}, frontier=0)
    return ControlPlane(run_id="run", ledger=ledger, channel=log)


def skip(seq: int) -> LogRecord:
    """Its line has a length of its own."""
    return LogRecord(kind="skip", seq=seq, reason="x" * (1 + seq * 7 % 50))


def lease(plane: ControlPlane, worker: str, group: int, lease_s: float = 60.0):
    return plane.ledger.lease(worker, group=group, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=lease_s)


def publish(plane: ControlPlane, held) -> list[int]:
    return plane.publish(held, {seq: make_ref(seq, held.attempt) for seq in held.wanted})


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


def test_what_is_trimmed_is_gone_and_the_last_that_was_read_stays(plane, redis_run):
    plane.log.publish([skip(seq) for seq in (0, 1, 3, 2)])
    plane.log.publish([skip(4)])
    assert len(plane.log.poll(4)) == 4
    plane.log.trim(3)
    assert [record.seq for record in RedisChannel(redis_run).poll()] == [3, 2, 4]  # up to the first that is not past
    plane.log.trim(100)
    assert [record.seq for record in RedisChannel(redis_run).poll()] == [2, 4]
    assert [record.seq for record in plane.log.poll()] == [4]
    plane.log.trim(100)
    assert [record.seq for record in RedisChannel(redis_run).poll()] == [4]


def test_a_reader_that_has_read_nothing_trims_nothing(plane, redis_run):
    plane.log.publish([skip(0), skip(1)])
    plane.log.trim(100)
    assert len(plane.log.poll()) == 2


def test_a_long_log_is_trimmed_in_slices(plane, redis_run):
    """Redis serves nobody else while it drops some."""
    for first in range(0, 2300, 50):
        plane.log.publish([skip(seq) for seq in range(first, first + 50)])
    while plane.log.poll():
        pass
    before = num_trims(redis_run)
    plane.log.trim(2250)
    assert redis_run.ask("XLEN", redis_run.key("log")) == 50
    assert num_trims(redis_run) == before + 3


def num_trims(server: RedisServer) -> int:
    lines = server.ask("INFO", "COMMANDSTATS").decode().split()
    return sum(int(line.split("calls=")[1].split(",")[0]) for line in lines if line.startswith("cmdstat_xtrim"))


def test_a_look_at_the_log_costs_what_is_new(plane, redis_run):
    """Not the length of the log: a reader at its end gets its own last entry and what came since."""
    plane.log.publish([skip(seq) for seq in range(2000)])
    while plane.log.poll():
        pass
    sent = num_bytes_sent(redis_run)
    for seq in range(20):
        plane.log.publish([skip(seq)])
        assert len(plane.log.poll()) == 1
    assert num_bytes_sent(redis_run) - sent < 40_000


def num_bytes_sent(server: RedisServer) -> int:
    lines = server.ask("INFO", "STATS").decode().split()
    return next(int(line.partition(":")[2]) for line in lines if line.startswith("total_net_output_bytes"))


@pytest.mark.parametrize(
    "act", [lambda plane: lease(plane, "a", 4), lambda plane: plane.ledger.renew("b", 60)], ids=["lease", "renew"]
)
def test_a_call_costs_the_same_however_many_samples_are_wanted(plane, redis_run, act):
    """As many as there are, after a store was lost. The fastest of thirty calls counts."""

    def cost(num_wanted: int) -> int:
        wanted = {seq: Sample("wanted", 1) for seq in range(num_wanted)}
        plane.ledger.begin(RunPlan(start=0, stop=50000, window=4), wanted, frontier=num_wanted)
        redis_run.ask("SLOWLOG", "RESET")
        for _ in range(30):
            act(plane)
        entries = redis_run.ask("SLOWLOG", "GET", 100)
        return min(micros for _, _, micros, command, *_ in entries if command[0].startswith(b"EVAL"))

    redis_run.ask("CONFIG", "SET", "slowlog-log-slower-than", 0)
    few, many = cost(50), cost(20000)
    redis_run.ask("CONFIG", "SET", "slowlog-log-slower-than", 10000)
    assert many < 3 * few


def num_leased(redis_run) -> int:
    return redis_run.ask("ZCARD", redis_run.key("open"))


def test_a_lease_whose_samples_are_gone_is_over(plane, redis_run):
    held = lease(plane, "a", 4)
    assert num_leased(redis_run) == 4
    plane.ledger.free(held.wanted)
    assert num_leased(redis_run) == 0
    plane.ledger.renew("a", 60.0)
    assert publish(plane, held) == []
    assert num_leased(redis_run) == 0


def test_a_lease_that_was_taken_over_is_over(plane, redis_run):
    late = lease(plane, "a", 4, lease_s=-1)
    assert publish(plane, lease(plane, "b", 4)) == list(late.wanted)
    assert publish(plane, late) == []
    assert num_leased(redis_run) == 0
