"""The trainer's end: begin, train, end, for any number of ranks; what is in the store is freed exactly once."""

import json
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch

from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.control import ControlPlane, RunPlan, log as log_module, resolve_control_plane
from lightning_dataflow.data import DataFlowDataModule, ManifestSource, PassOrder, queue as queue_module
from lightning_dataflow.data.announcement import Announcement
from lightning_dataflow.stores import MemoryFeatureStore, SharedDirFeatureStore
from tests.records import PLAN, memory_plane, rank_slice
from tests.streams import CARD, SeqFeed, make_source, make_worker


@pytest.fixture(autouse=True)
def look_at_peers_at_once(monkeypatch):
    monkeypatch.setattr(queue_module, "CHECK_PEERS_S", 0.0)


@pytest.fixture
def store():
    return MemoryFeatureStore()


@pytest.fixture
def plane(tmp_path):
    return memory_plane(tmp_path)


def another_reader(plane: ControlPlane) -> ControlPlane:
    return ControlPlane(run_id="run", ledger=plane.ledger, channel=memory_plane(plane.log.name).log)


def capture(worker, groups: int) -> None:
    for _ in range(groups):
        assert worker.run_once() == "captured"


def train(source, window: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """Read, apply and free one window; the numbers that its features hold."""
    share = rank_slice(window, 4, rank, world_size)
    found = source.window(range(4 * window, 4 * window + 4), share)
    handles, values = [], []
    for ref in found.refs:
        tensors, handle = source.store.get(ref)
        handles.append(handle)
        values.append(int(tensors["last_hidden_state"][0, 0]))
    for handle in handles:
        source.store.release(handle)
    source.applied(list(share), 4 * window + 4, window + 1)
    return values


def test_a_run_frees_all_it_captured(plane, store):
    worker = make_worker(plane, store)
    source = make_source(plane, store)
    source.begin(PLAN, 0, 1)
    capture(worker, 14)
    assert train(source, 0) == [0, 1, 2, 3]
    assert train(source, 1) == [4, 5, 6, 7]
    source.window(range(8, 12), range(8, 12))  # read ahead and never trained
    assert source.in_flight()["refs_in_flight"] == store.health()["num_samples"] == 6
    assert source.in_flight()["bytes_in_flight"] == store.health()["num_bytes"]
    source.finish("interrupted")
    assert store.health()["num_samples"] == 0
    assert plane.ledger.finished() == "interrupted"
    assert worker.run_once() == "finished"


def test_two_ranks_train_all_once_and_a_rank_behind_leaves_nothing(plane, store):
    worker = make_worker(plane, store)
    sources = [make_source(plane, store), make_source(another_reader(plane), store)]
    for rank, source in enumerate(sources):
        source.begin(PLAN, rank, 2)
    capture(worker, 16)
    values = [train(source, window, rank, 2) for window in range(2) for rank, source in enumerate(sources)]
    assert [value for one in values for value in one] == list(range(8))
    sources[0].window(range(8, 12), range(8, 10))  # rank 0 is a window ahead when the run ends
    for source in sources:
        source.cancel()
        source.finish("interrupted")
    assert store.health()["num_samples"] == 0


def test_what_arrives_late_is_freed_with_its_window(plane, store, monkeypatch):
    """A worker was killed between append and commit; its samples are captured again while they are trained."""
    worker = make_worker(plane, store, group=4, lease_s=-1.0)
    source = make_source(plane, store)
    source.begin(PLAN, 0, 1)
    append = plane.log.append

    def die(lines):
        append(lines)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(plane.log, "append", die)
        patch.setattr(store, "free", lambda ref: None)
        patch.setattr(type(plane), "give_back", lambda *arguments, **options: None)
        with pytest.raises(SystemExit):
            worker.run_once()
    found = source.window(range(4), range(4))
    tensors = [store.get(ref) for ref in found.refs]
    capture(worker, 1)
    for _, handle in tensors:
        store.release(handle)  # of generations that are superseded by now
    assert store.health()["num_samples"] == 4
    source.queue.catch_up()
    source.applied(range(4), 4, 1)
    assert store.health()["num_samples"] == 0
    assert plane.ledger.status()["refs_in_flight"] == 0


def test_a_resumed_run_captures_what_is_missing(plane, store):
    worker = make_worker(plane, store, group=2)
    first = make_source(plane, store)
    first.begin(PLAN, 0, 1)
    capture(worker, 6)
    assert train(first, 0) == [0, 1, 2, 3]
    assert train(first, 1) == [4, 5, 6, 7]
    # killed here; the checkpoint was of step 1
    resumed = make_source(plane, store)
    resumed.begin(RunPlan(start=4, stop=40, window=4), 0, 1)
    assert resumed.reconciliation.lost == {4, 5, 6, 7}
    capture(worker, 2)
    assert [train(resumed, window) for window in (1, 2)] == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert (resumed.skipped(), resumed.recaptured()) == ({}, [4, 5, 6, 7])
    resumed.finish("completed")
    assert store.health()["num_samples"] == 0


def test_a_second_fit_in_one_process_starts_over(plane, store):
    worker = make_worker(plane, store)
    source = make_source(plane, store)
    for _ in range(3):
        source.begin(RunPlan(start=0, stop=8, window=4), 0, 1)
        capture(worker, 8)
        assert worker.run_once() == "idle"
        assert train(source, 0) + train(source, 1) == list(range(8))
        source.finish("completed")
        assert store.health()["num_samples"] == 0
    source.queue.catch_up()
    fresh = make_source(another_reader(plane), store)
    fresh.begin(RunPlan(start=0, stop=8, window=4), 0, 1)
    assert fresh.reconciliation.lost == set(range(8))


def test_segments_are_trimmed_at_checkpoints_and_skips_survive_until_then(tmp_path, store):
    plane = memory_plane(tmp_path)
    plane.log.segment_bytes = 2000
    worker = make_worker(plane, store)
    source = make_source(plane, store)
    source.begin(PLAN, 0, 1)
    for window in range(10):
        capture(worker, 4)
        train(source, window)
    before = len(list(tmp_path.glob("log-*")))
    source.durable(20, 5)
    assert len(list(tmp_path.glob("log-*"))) == before  # a resume may need the checkpoint before this one
    source.durable(40, 10)
    between = len(list(tmp_path.glob("log-*")))
    source.durable(40, 10)
    assert before > between > len(list(tmp_path.glob("log-*"))) == 1
    assert plane.ledger.status()["durable_step"] == 10
    source.finish("completed")


def test_a_trainer_that_never_began_ends_nobodys_run(plane, store):
    worker = make_worker(plane, store)
    running = make_source(plane, store)
    running.begin(PLAN, 0, 1)
    capture(worker, 4)
    wrong = make_source(another_reader(plane), store)
    wrong.order = PassOrder(300, 5)
    with pytest.raises(UserError, match="count samples in the order of seed 0, this trainer has seed 5: use one seed"):
        wrong.check_order()
    wrong.finish("failed: another seed")
    assert plane.ledger.finished() is None
    assert train(running, 0) == [0, 1, 2, 3]
    running.finish("completed")


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_refuses_another_seed_before_it_waits_for_others(plane, store, rank):
    make_worker(plane, store)
    data = DataFlowDataModule(make_source(plane, store), global_batch_size=4, seed=5)
    place = {"global_rank": rank, "world_size": 2, "global_step": 0, "max_steps": 3, "checkpoint_callbacks": ()}
    data.trainer = SimpleNamespace(**place, strategy=SimpleNamespace(barrier=lambda name: pytest.fail("it waits")))
    with pytest.raises(UserError, match="this trainer has seed 5"):
        data.start(resumed=False)


def test_only_the_rank_that_frees_features_builds_the_refs_of_a_fit_before(plane, store, monkeypatch):
    worker = make_worker(plane, store)
    first = make_source(plane, store)
    first.begin(PLAN, 0, 1)
    capture(worker, 8)
    built = []
    read = log_module.ref_from_json
    monkeypatch.setattr(log_module, "ref_from_json", lambda data: built.append(data) or read(data))
    resumed = make_source(another_reader(plane), store)
    resumed.begin(RunPlan(start=8, stop=40, window=4), 1, 2)
    assert built == []
    first.finish("completed")


def test_nobody_announces(plane, store):
    with pytest.raises(PeerTimeoutError, match="for a producer to announce the run"):
        make_source(plane, store, start_timeout_s=0.02)


def test_the_log_of_another_run(tmp_path, plane, store):
    make_worker(plane, store)
    with pytest.raises(UserError, match=r"belongs to run run, this trainer is of run other: .* same run_name"):
        make_source(memory_plane(tmp_path, "other"), store)


def test_announcements():
    options = {"num_samples": 5, "seed": None, "token_counts": {1: 3, 3: 1}, "capture_batch_size": 1, "largest_bytes": 9}
    announcement = Announcement(run_id="run", card=CARD, **options)
    announced = json.loads(json.dumps(announcement.to_json()))
    assert Announcement.from_json(announced, "here") == announcement
    for damage in ({"num_samples": 0}, {"token_counts": {"1": -1}}, {"token_counts": {"x": 1}}, {"card": {}}, {"seed": 1}):
        damaged = {**announced, **damage}
        if "seed" in damage:
            del damaged["num_samples"]
        with pytest.raises(UserError, match=r"what here announces is damaged .* another run_name"):
            Announcement.from_json(damaged, "here")


def test_token_counts_of_another_vocabulary(plane, store):
    make_worker(plane, store)
    source = make_source(plane, store)
    assert torch.equal(source.token_counts(10), torch.tensor([1] * 8 + [0, 0]))
    with pytest.raises(UserError, match="announced token id 7, the target's vocabulary has 5"):
        source.token_counts(5)


def test_a_manifest_is_read_for_several_passes(tmp_path):
    plane = memory_plane(tmp_path / "log")
    store = SharedDirFeatureStore(tmp_path / "store", retain=True)
    worker = make_worker(plane, store, SeqFeed(length=6))
    source = ManifestSource(plane, store, start_timeout_s=1, idle_timeout_s=5)
    source.order = order = PassOrder(6, 0)
    source.begin(RunPlan(start=0, stop=12, window=4), 0, 1)
    producing = threading.Thread(target=worker.run)
    producing.start()
    seen = []
    for window in range(3):
        seqs = range(4 * window, 4 * window + 4)
        for ref in source.window(seqs, seqs).refs:
            tensors, handle = store.get(ref)
            seen.append(int(tensors["last_hidden_state"][0, 0]))
            store.release(handle)
        source.applied(list(seqs), seqs.stop, window + 1)
    assert seen == [order.locate(seq)[0] for seq in range(12)]
    ref = source.window(range(4), range(4)).refs[1]
    store.free(ref)
    replaced = source.replace(1, ref, "gone")
    assert replaced.origin.attempt == 1
    assert source.window(range(4), range(4)).refs[1] == replaced
    source.finish("completed")
    producing.join(5)
    assert not producing.is_alive()
    assert store.health()["num_samples"] == 0


def test_listed_samples_of_a_manifest_are_skipped_in_every_pass(tmp_path):
    plane = memory_plane(tmp_path / "log")
    store = SharedDirFeatureStore(tmp_path / "store", retain=True)
    worker = make_worker(plane, store, SeqFeed(length=6))
    source = ManifestSource(plane, store, start_timeout_s=1, idle_timeout_s=5)
    source.order = order = PassOrder(6, 0)
    source.skip_ids = frozenset({"s2"})
    source.begin(RunPlan(start=0, stop=12, window=6), 0, 1)
    capture(worker, 6)
    windows = [source.window(seqs, seqs) for seqs in (range(6), range(6, 12))]
    listed = {seq for seq in range(12) if order.locate(seq)[0] == 2}
    refs = [ref for window in windows for ref in window.refs]
    assert {seq for seq, ref in enumerate(refs) if ref is None} == listed
    assert source.skipped() == dict.fromkeys(listed, "listed in skip_ids")
    assert [window.num_tokens for window in windows] == [sum(2 + index % 3 for index in range(6))] * 2
    source.finish("completed")
    assert store.health()["num_samples"] == 0


def test_a_run_that_another_trainer_trains_is_refused_and_a_dead_ones_is_not(plane, store, monkeypatch):
    make_worker(plane, store)
    with subprocess.Popen(["sleep", "60"]) as other:
        with monkeypatch.context() as patched:
            patched.setattr("os.getpid", lambda: other.pid)
            plane.ledger.report("trainer-0", "training")
        with pytest.raises(UserError, match=rf"process {other.pid} on .* trains run run \(training\): end it first"):
            make_source(plane, store).begin(PLAN, 0, 1)
        other.kill()
    source = make_source(plane, store)
    source.begin(PLAN, 0, 1)
    source.finish("completed")


def test_a_trainer_that_another_replaced_leaves_everything_to_it(tmp_path, store):
    """It was cut off, and another began: it ends at its next step, and frees and ends nothing."""
    planes = [resolve_control_plane("disaggregated", "run", path=tmp_path) for _ in range(3)]
    worker = make_worker(planes[0], store)
    old, new = (make_source(plane, store) for plane in planes[1:])
    old.begin(PLAN, 0, 1)
    capture(worker, 4)
    assert train(old, 0) == [0, 1, 2, 3]
    capture(worker, 4)
    before = store.health()["num_samples"]
    new.begin(RunPlan(start=4, stop=40, window=4), 0, 1)
    with pytest.raises(PeerFailedError, match="took over this run because this process had gone silent"):
        old.applied([], 8, 2)
    assert (old.frees_at_end(), new.frees_at_end()) == (False, True)
    old.finish("failed: it was taken over")
    assert store.health()["num_samples"] == before
    assert new.plane.ledger.finished() is None
    assert train(new, 1) == [4, 5, 6, 7]
    new.finish("completed")
    for plane in planes:
        plane.close()
