"""Log and ledger together: publishing, and beginning again after any crash."""

import pytest

from lightning_dataflow.contracts import UnknownNameError, UserError
from lightning_dataflow.control import (
    NoOpMetadataStore,
    Reconciliation,
    RunPlan,
    SqliteMetadataStore,
    reconcile_on_restart,
    resolve_control_plane,
)
from tests.records import WIDE, begin, leased, make_origin, make_ref, memory_plane


@pytest.fixture
def store():
    from lightning_dataflow.stores import MemoryFeatureStore

    return MemoryFeatureStore()


@pytest.fixture(params=["memory", "redis"])
def opener(request, tmp_path):
    """Opens the run once more: with the ledger that survives a crash of everything else, if one does."""
    if request.param == "memory":
        return lambda: memory_plane(tmp_path)
    server = request.getfixturevalue("redis_run")
    return lambda: resolve_control_plane("disaggregated", server.run_id, redis=server.where)


@pytest.fixture
def plane(opener):
    made = opener()
    made.log.announce({"run_id": "run"})
    return made


def lease(plane, worker="a", group=4, lease_s=60.0):
    return leased(plane.ledger.lease(worker, group=group, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=lease_s))


def put(store, seq, attempt=0):
    from tests.streams import make_tensors

    return store.put(make_tensors(seq), make_origin(seq, attempt))


def capture(store, found):
    return {seq: put(store, seq, found.attempt) for seq in found.wanted}


def produce(plane, store, groups=1):
    """Published refs by seq."""
    refs = {}
    for _ in range(groups):
        found = lease(plane)
        captured = capture(store, found)
        assert plane.publish(found, captured) == list(captured)
        refs |= captured
    return refs


def read_all(plane):
    plane.log.rewind()
    records = []
    while found := plane.log.poll():
        records += found
    return records


def restart(plane, store, start=0, stop=100, window=4) -> Reconciliation:
    return reconcile_on_restart(plane, store, RunPlan(start=start, stop=stop, window=window), lambda: read_all(plane))


def kinds(plane):
    return [(record.kind, record.seq) for record in read_all(plane)]


def test_each_mode_has_its_control_plane(tmp_path):
    local = resolve_control_plane("local_colocated", "run")
    assert isinstance(local.ledger, NoOpMetadataStore)
    assert local.channel is None
    colocated = resolve_control_plane("dataflow_colocated", "run", path=tmp_path / "a")
    assert isinstance(colocated.ledger, SqliteMetadataStore)
    assert not (tmp_path / "a" / "ledger.sqlite").exists()
    shared = resolve_control_plane("disaggregated", "run", path=tmp_path / "b")
    begin(shared)
    assert resolve_control_plane("disaggregated", "run", path=tmp_path / "b").ledger.plan() is not None
    assert shared.log.name == str(tmp_path / "b")
    with pytest.raises(UnknownNameError, match=r"unknown deployment mode 'remote': available are local_colocated, "):
        resolve_control_plane("remote", "run")
    for mode in ("dataflow_colocated", "disaggregated"):
        with pytest.raises(UserError, match=r"channel\.path"):
            resolve_control_plane(mode, "run")


def test_the_first_attempt_is_a_ref_and_later_ones_supersede(plane, store):
    begin(plane)
    refs = produce(plane, store)
    plane.ledger.want(1, refs[1].generation)
    produce(plane, store)
    assert kinds(plane) == [("ref", 0), ("ref", 1), ("ref", 2), ("ref", 3), ("supersede", 1)]


def test_what_is_not_accepted_is_not_published(plane, store):
    begin(plane)
    old = lease(plane, "old", lease_s=-1)
    new = lease(plane, "new")
    assert plane.publish(old, capture(store, old)) == []
    assert kinds(plane) == []
    assert plane.publish(new, capture(store, new)) == [0, 1, 2, 3]


def test_a_log_that_cannot_be_written_undoes_the_commit(tmp_path, store, monkeypatch):
    plane = memory_plane(tmp_path)
    begin(plane)
    found = lease(plane)
    with monkeypatch.context() as patch:
        patch.setattr(plane.channel, "_last_segment", lambda: "/dev/full")
        with pytest.raises(OSError, match="No space left"):
            plane.publish(found, capture(store, found))
    assert plane.ledger.status()["leased"] == 4
    assert plane.publish(found, capture(store, found)) == [0, 1, 2, 3]


def test_giving_up_publishes_skips(plane):
    begin(plane)
    for _ in range(3):
        assert kinds(plane) == []
        plane.give_back(lease(plane, group=2), "capture failed: too long")
    assert kinds(plane) == [("skip", 0), ("skip", 1)]
    assert read_all(plane)[0].reason == "capture failed: too long"


def test_a_new_run(plane, store):
    put(store, 0)  # somebody else's: there is no log that says what is ours
    found = restart(plane, store)
    assert found == Reconciliation(num_live=0, lost=frozenset(), swept={})
    assert kinds(plane) == [("begin", 0)]
    assert store.health()["num_samples"] == 1
    assert lease(plane).seqs == (0, 1, 2, 3)


def test_after_a_crash_live_samples_are_kept_and_lost_ones_captured_again(plane, store):
    begin(plane)
    refs = produce(plane, store, groups=2)
    open_lease = lease(plane)
    capture(store, open_lease)  # put, never published
    store.free(refs[1])
    found = restart(plane, store)
    assert found == Reconciliation(num_live=7, lost=frozenset({1}), swept={"orphans": 4})
    assert plane.publish(open_lease, {}) == []
    again, never_published, new = lease(plane), lease(plane), lease(plane)
    assert (again.wanted, again.attempt) == ((1,), 1)
    assert (never_published.seqs, never_published.attempt) == ((8, 9, 10, 11), 1)  # no attempt is used twice
    assert new.seqs == (12, 13, 14, 15)


def test_doing_it_twice_changes_nothing(plane, store):
    begin(plane)
    refs = produce(plane, store, groups=2)
    lease(plane)
    store.free(refs[1])
    first = restart(plane, store)
    status = plane.ledger.status()
    assert restart(plane, store) == Reconciliation(num_live=7, lost=frozenset({1}), swept={"orphans": 0})
    assert first.lost == {1}
    assert plane.ledger.status() == status
    assert lease(plane).attempt == 1


def test_without_the_ledger_the_log_is_enough(opener, plane, store):
    begin(plane)
    refs = produce(plane, store, groups=2)
    plane.ledger.want(4, refs[4].generation)
    produce(plane, store)
    fresh = opener()
    assert restart(fresh, store).num_live == 8
    assert fresh.ledger.status()["refs_in_flight"] == 8
    assert lease(fresh).seqs == (8, 9, 10, 11)


def test_gaps_are_captured_and_skips_stay(opener, plane, store):
    begin(plane)
    lease(plane)  # of a worker that dies
    produce(plane, store)
    plane.skip([5], "too long")
    fresh = opener()
    assert restart(fresh, store).num_live == 3
    assert lease(fresh).wanted == (0, 1, 2, 3)
    assert lease(fresh).wanted == (8, 9, 10, 11)


@pytest.mark.parametrize("start", [0, 4, 6])
def test_the_cursor_goes_back_or_starts_inside_a_group(plane, store, start):
    """Trained up to 8, then resumed from an older checkpoint: what was freed meanwhile is captured again."""
    begin(plane, window=2)
    refs = produce(plane, store, groups=3)
    for seq in range(8):
        store.free(refs[seq])
    plane.ledger.free(range(8))
    found = restart(plane, store, start=start, window=2)
    assert found.num_live == 4
    assert found.lost == frozenset(range(start, 8))
    wanted = [seq for one in iter(lambda: lease(plane), None) for seq in one.wanted if one.attempt]
    assert wanted == list(range(start, 8))


def test_a_plan_that_ends_earlier_sweeps_what_is_beyond(plane, store):
    begin(plane)
    produce(plane, store, groups=3)
    assert restart(plane, store, stop=8) == Reconciliation(num_live=8, lost=frozenset(), swept={"orphans": 4})
    assert lease(plane) is None
    assert restart(plane, store, stop=12).lost == frozenset(range(8, 12))


def test_a_publish_while_the_log_is_being_read(plane, store):
    """An old worker's last commit is either in what is read or refused."""
    begin(plane)
    mine, late = lease(plane, "mine"), lease(plane, "late")
    plane.publish(mine, capture(store, mine))
    captured = capture(store, late)
    refused = []

    def read():
        records = read_all(plane)
        refused.append(plane.publish(late, captured))
        return records

    reconcile_on_restart(plane, store, RunPlan(start=0, stop=100, window=4), read)
    assert refused == [[]]
    again = lease(plane)
    assert (again.seqs, again.attempt) == (late.seqs, 1)


def test_a_crash_between_append_and_commit(tmp_path, store, monkeypatch):
    """The log has the refs, the ledger does not: the next attempt supersedes them."""
    plane = memory_plane(tmp_path)
    plane.log.announce({"run_id": "run"})
    begin(plane)
    found = lease(plane, lease_s=-1)
    append = plane.log.append

    def die(lines):
        append(lines)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(plane.log, "append", die)
        with pytest.raises(SystemExit):
            plane.publish(found, capture(store, found))
    assert kinds(plane) == [("ref", seq) for seq in range(4)]
    again = lease(plane)
    assert (again.seqs, again.attempt) == ((0, 1, 2, 3), 1)
    refs = capture(store, again)
    assert plane.publish(again, refs) == [0, 1, 2, 3]
    assert store.health()["num_samples"] == 4
    assert restart(plane, store).num_live == 4


def test_refs_of_the_log_alone_are_enough_to_know_what_counts(plane, store):
    begin(plane)
    refs = produce(plane, store)
    plane.ledger.want(0, refs[0].generation)
    newer = produce(plane, store)
    assert store.exists([refs[0], newer[0]]) == [False, True]
    assert restart(plane, store) == Reconciliation(num_live=4, lost=frozenset(), swept={"orphans": 0})
    assert make_ref(0).generation != make_ref(0).generation
