"""One contract, every ledger: who captures what, and what became of it."""

import time

from lightning_dataflow.control import MAX_ATTEMPTS, NoLease, RedisMetadataStore, RunPlan, Watermarks
from lightning_dataflow.control.heartbeat import end_leases
from tests.unit.control.ledgers import SIZE, begin, commit, generation, give_back, in_flight, lease


def test_nothing_is_leased_before_a_run_begins(ledger):
    assert ledger.plan() is None
    assert lease(ledger) is None
    begin(ledger, stop=8)
    assert ledger.plan() == RunPlan(start=0, stop=8, window=4)


def test_what_gives_no_lease_says_why(ledger):
    plan = RunPlan(start=0, stop=4, window=4)

    def ask(high_refs: int) -> NoLease:
        marks = Watermarks(high_refs=high_refs, low_refs=1, high_bytes=1 << 40, low_bytes=1 << 39)
        return ledger.lease("a", group=4, num_bytes=lambda seq: SIZE, watermarks=marks, lease_s=60.0)

    assert ask(8) == NoLease("not begun")
    begin(ledger, stop=4)
    assert ask(2) == NoLease("paused", plan)
    assert ask(8).plan == plan
    assert ask(8) == NoLease("nothing left", plan)
    before = ledger.now()
    ledger.finish("completed")
    reason, known, finished_at = ask(8)
    assert (reason, known) == ("finished", plan)
    assert before <= finished_at <= ledger.now()


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


def test_a_lease_that_has_expired_is_not_renewed(ledger):
    begin(ledger)
    lease(ledger, "a", lease_s=-1)
    ledger.renew("a", 60)
    found = lease(ledger, "b")
    assert (found.seqs, found.tries) == ((0, 1, 2, 3), 1)


def test_what_is_wanted_again_is_leased_in_order_with_what_expired(ledger):
    begin(ledger, wanted={17: 1, 5: 1, 12: 1}, frontier=20)
    lease(ledger, "dead", group=1)
    for _ in range(2):
        lease(ledger, "alive", group=1)
    lease(ledger, "dead", group=1)
    ledger.renew("dead", 0)
    time.sleep(0.001)
    assert [lease(ledger, group=1).seqs[0] for _ in range(3)] == [5, 20, 21]


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


def test_a_failure_that_does_not_count(ledger):
    begin(ledger)
    for attempt in range(2 * MAX_ATTEMPTS):
        found = lease(ledger)
        assert (found.seqs, found.attempt) == ((0, 1, 2, 3), attempt)
        assert give_back(ledger, found, counts=False) == []
    assert in_flight(ledger) == (4, 40)


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
        patch.setattr("lightning_dataflow.control.processes.pid_space", lambda: "another host")  # SQLite has one host
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
