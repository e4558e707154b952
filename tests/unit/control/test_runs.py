"""One contract, every ledger: runs begin, end, and are claimed."""

import os

import pytest

from lightning_dataflow.contracts import LogRecord, PeerFailedError
from lightning_dataflow.control import Lease, NoOpMetadataStore, RedisMetadataStore, RunPlan
from tests.records import failures, log_of
from tests.unit.control.ledgers import HOST, SIZE, begin, commit, generation, give_back, in_flight, lease


def test_begin_replaces_what_was_known_and_voids_leases(ledger):
    begin(ledger)
    old = lease(ledger)
    ledger.report("producer-0", "out of memory", failed=True)
    ledger.report("trainer-0", "training")
    begin(ledger, start=4, stop=20, published={5: ("0-0", 7)}, wanted={4: 2}, frontier=8)
    assert commit(ledger, old) == []
    assert in_flight(ledger) == (2, 7)
    assert failures(ledger) == []
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
    assert give_back(ledger, old) == []
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
    own = Lease(worker="a", seqs=(0, 1), wanted=(0, 1), attempt=0, plan=RunPlan(start=0, stop=2, window=2))
    assert commit(ledger, own) == commit(ledger, own) == [0, 1]
    assert give_back(ledger, own) == []
    assert not ledger.want(0, "0-0")
    assert ledger.fence() == {}
    ledger.finish("completed")
    ledger.report("a", "b", failed=True)
    assert ledger.finished() is None
    assert failures(ledger) == []
    assert in_flight(ledger) == (0, 0)


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
        with pytest.raises(PeerFailedError, match=rf"process {os.getpid()} on {HOST} took over this run"):
            change()
    assert in_flight(new) == (4, 4 * SIZE)
    status = new.status()
    assert (status["trained_seq"], status["durable_seq"], status["finished"]) == (0, 0, None)
    assert [part["state"] for part in status["parts"]] == ["beginning"]
    new.ack(4, 1, range(4))
    assert commit(producer, lease(producer)) == [4, 5, 6, 7]
    assert old.claim("trainer-0", "again", (HOST, os.getpid()))  # a later one wins again
    assert [one.is_ours() for one in (old, new)] == [True, False]
