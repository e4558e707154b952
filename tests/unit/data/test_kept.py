"""`release_at`: what was trained stays in the store until a checkpoint, and nothing waits for itself."""

import random
import threading

import pytest

from lightning_dataflow.contracts import PeerTimeoutError
from lightning_dataflow.control import ControlPlane, RunPlan, Watermarks
from lightning_dataflow.data import Batching, queue as queue_module
from lightning_dataflow.data.kept import KeptSamples
from lightning_dataflow.data.reader import WindowReader
from lightning_dataflow.stores import MemoryFeatureStore, SharedDirFeatureStore
from tests.records import WIDE, memory_plane, rank_slice
from tests.streams import SeqFeed, make_source, make_worker

LARGEST = SeqFeed().num_bytes(2)


@pytest.fixture(autouse=True)
def look_at_peers_at_once(monkeypatch):
    monkeypatch.setattr(queue_module, "CHECK_PEERS_S", 0.0)


def marks(refs: int = 1 << 20, size: int = 1 << 30, low: float = 0.75) -> Watermarks:
    return Watermarks(high_refs=refs, low_refs=int(low * refs), high_bytes=size, low_bytes=int(low * size))


class Rank:
    """A trainer's rank, which reads windows, trains them, and frees what `release_at` says."""

    def __init__(self, plane: ControlPlane, store, rank: int = 0, world_size: int = 1, window: int = 4, **options):
        own = ControlPlane(run_id="run", ledger=plane.ledger, channel=memory_plane(plane.log.name).log)
        self.source = make_source(own, store, **{"idle_timeout_s": 0.2} | options)
        self.rank, self.world_size, self.window = rank, world_size, window
        self.held: list = []
        self.saved: list[int] = []
        self.values: list[int] = []

    def begin(self, start: int, stop: int) -> None:
        self.source.begin(RunPlan(start=start, stop=stop, window=self.window), self.rank, self.world_size)

    def train(self, index: int, *, saves: bool = True) -> None:
        seqs = range(index * self.window, (index + 1) * self.window)
        share = rank_slice(index, self.window, self.rank, self.world_size)
        for seq, ref in zip(share, self.source.window(seqs, share).refs, strict=True):
            tensors, handle = self.source.store.get(ref)
            self.values.append(int(tensors["last_hidden_state"][0, 0]))
            self.held.append((seq, handle))
        freed = self.free() if self.source.release_at == "applied" else []
        self.source.applied(freed, seqs.stop, index + 1)
        if saves and self.source.must_save():
            self.saved.append(index + 1)
            self.source.durable(seqs.stop, index + 1, self.free())

    def free(self) -> list[int]:
        self.source.store.release_many([handle for _, handle in self.held])
        freed, self.held = [seq for seq, _ in self.held], []
        return freed


def capture_all(worker) -> None:
    while worker.run_once() == "captured":
        pass


def test_a_checkpoint_is_due_while_the_next_window_fits_and_at_half():
    kept = KeptSamples(marks(refs=20), window=4, group=1, largest_bytes=10)
    due = []
    for step in range(1, 6):
        kept.add(4 * step, 4, 40)
        due.append(kept.must_save())
    assert due == [False, False, True, True, True]
    kept.durable(12)
    assert not kept.must_save()
    tight = KeptSamples(marks(size=130), window=4, group=8, largest_bytes=10)  # 11 refs at once: 110 of 130 bytes
    tight.add(4, 4, 20)
    assert not tight.must_save()
    tight.add(8, 4, 1)
    assert tight.must_save()
    tightest = KeptSamples(marks(refs=4), window=4, group=1, largest_bytes=10)
    assert not tightest.must_save()
    tightest.add(4, 4, 1)
    assert tightest.must_save()


@pytest.mark.parametrize("seed", range(8))
def test_tiny_watermarks_train_all_and_are_never_exceeded(tmp_path, seed):
    """Capture and trainer take turns here, so a window that is not there while capture waits would never come."""
    draw = random.Random(seed)
    window, group = draw.choice([(4, 1), (4, 4), (6, 4), (4, 8)])
    needed = window + group
    if draw.random() < 0.5:
        bound = marks(refs=needed + draw.randrange(3 * window), low=draw.choice([0.0, 0.75]))
    else:
        bound = marks(size=(needed + draw.randrange(3 * window)) * LARGEST, low=draw.choice([0.0, 0.75]))
    plane, store = memory_plane(tmp_path), MemoryFeatureStore()
    worker = make_worker(plane, store, watermarks=bound, group=group)
    world_size = draw.choice([1, 2])
    ranks = [Rank(plane, store, rank, world_size, window, durable_below=bound) for rank in range(world_size)]
    for one in ranks:
        one.begin(0, 24 * window)
    for index in range(24):
        capture_all(worker)
        for one in ranks:
            one.train(index)
        status = plane.ledger.status()
        assert status["refs_in_flight"] <= bound.high_refs
        assert status["bytes_in_flight"] <= bound.high_bytes
        assert (status["refs_in_flight"], status["bytes_in_flight"]) == tuple(
            store.health()[name] for name in ("num_samples", "num_bytes")
        )
        assert status["kept_refs"] + status["waiting_to_be_trained"] == status["refs_in_flight"]
    assert sorted(value for one in ranks for value in one.values) == list(range(24 * window))
    assert all(one.saved == ranks[0].saved for one in ranks)
    assert 1 < len(ranks[0].saved) <= 24
    for one in ranks:
        one.free()
        one.source.finish("completed")
    assert store.health()["num_samples"] == plane.ledger.status()["refs_in_flight"] == 0


def test_without_those_checkpoints_the_run_would_wait_for_itself(tmp_path):
    plane, store, bound = memory_plane(tmp_path), MemoryFeatureStore(), marks(refs=12)
    worker = make_worker(plane, store, watermarks=bound)
    rank = Rank(plane, store, durable_below=bound)
    rank.begin(0, 40)
    with pytest.raises(PeerTimeoutError):
        for index in range(10):
            capture_all(worker)
            rank.train(index, saves=False)


@pytest.mark.parametrize(("release_at", "lost"), [("durable", 0), ("applied", 8)])
def test_a_resume_captures_what_was_freed_and_nothing_else(tmp_path, release_at, lost):
    plane, bound = memory_plane(tmp_path), WIDE if release_at == "durable" else None
    store, killed = (SharedDirFeatureStore(tmp_path / "store") for _ in range(2))  # leases die with their process
    worker = make_worker(plane, store)
    first = Rank(plane, killed, durable_below=bound)
    first.begin(0, 40)
    capture_all(worker)
    for index in range(5):
        first.train(index)
        if index == 2:
            first.source.durable(12, 3, first.free())
    assert plane.ledger.status()["kept_refs"] == 8 - lost
    resumed = Rank(plane, store, durable_below=bound)
    resumed.begin(12, 40)
    assert len(resumed.source.reconciliation.lost) == lost
    capture_all(worker)
    for index in range(3, 10):
        resumed.train(index)
    assert resumed.values == list(range(12, 40))
    assert len(resumed.source.recaptured()) == lost
    resumed.free()
    resumed.source.finish("completed")
    assert store.health()["num_samples"] == 0


@pytest.mark.parametrize("release_at", ["applied", "durable"])
def test_a_sample_lost_before_it_is_read_is_trained_in_its_place_or_named(tmp_path, release_at):
    """Seq 2 is lost once; seq 5 every time."""
    plane, store = memory_plane(tmp_path), MemoryFeatureStore()
    worker = make_worker(plane, store)
    publish = plane.publish

    def lose(lease, refs, *others):
        for seq, ref in refs.items():
            if seq == 5 or (seq == 2 and not lease.attempt):
                store.free(ref)
        return publish(lease, refs, *others)

    object.__setattr__(plane, "publish", lose)
    own = ControlPlane(run_id="run", ledger=plane.ledger, channel=memory_plane(tmp_path).log)
    source = make_source(own, store, durable_below=WIDE if release_at == "durable" else None)
    source.begin(RunPlan(start=0, stop=8, window=4), 0, 1)
    producing = threading.Thread(target=worker.run)
    producing.start()
    collate = lambda rows: {"values": [int(one.sample.tensors["last_hidden_state"][0, 0]) for one in rows]}  # noqa: E731
    reader = WindowReader(
        source=source,
        collate=collate,
        batching=Batching(global_batch_size=4, micro_batch_size=4),
        next_seq=0,
        num_windows=2,
        rank=0,
        world_size=1,
    )
    batches = [batch["values"] for batch in reader]
    assert batches == [[0, 1, 2, 3], [4, 0, 6, 7]]  # a placeholder at seq 5
    assert set(source.skipped()) == {5}
    assert list(source.recaptured()) == [2, 5, 5]
    assert plane.ledger.status()["given_up"] == 1
    reader.discard()
    source.finish("completed")
    producing.join(5)
    assert store.health()["num_samples"] == 0


def test_without_checkpoints_the_log_is_trimmed_behind_what_is_trained(tmp_path):
    plane, store = memory_plane(tmp_path), MemoryFeatureStore()
    plane.log.segment_bytes = 2000
    worker = make_worker(plane, store)
    rank = Rank(plane, store)
    rank.source.resumable = False
    rank.begin(0, 40)
    for index in range(10):
        capture_all(worker)
        rank.train(index)
    assert len(list(tmp_path.glob("log-*"))) == 1
