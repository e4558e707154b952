"""Windows to micro-batches when samples are lost."""

import threading

import lightning as L
import pytest
import torch

from lightning_dataflow.control import ControlPlane
from lightning_dataflow.data import Batching, DataFlowDataModule, PassOrder, SampleRows
from lightning_dataflow.data.reader import PLACEHOLDER_TOKENS, WindowReader
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.stores import MemoryFeatureStore, SharedDirFeatureStore
from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from tests.records import PLAN, memory_plane
from tests.streams import SeqFeed, make_source, make_worker


@pytest.fixture
def store():
    return MemoryFeatureStore()


@pytest.fixture
def source(tmp_path, store):
    """With three windows of four samples in the store, and a worker beside it."""
    plane = memory_plane(tmp_path)
    made = make_worker(plane, store)
    source = make_source(plane, store)
    source.begin(PLAN, 0, 1)
    for _ in range(12):
        made.run_once()
    source.worker = made
    yield source
    source.finish("completed")
    assert store.health()["num_samples"] == 0


def read(source, **options) -> WindowReader:
    batching = Batching(global_batch_size=4, micro_batch_size=2)
    place = {"next_seq": 0, "num_windows": 10, "rank": 0, "world_size": 1} | options
    return WindowReader(source=source, collate=SampleRows.stack, batching=batching, **place)


def lose(source, seq: int) -> None:
    (ref,) = source.window(range(seq, seq + 1), range(seq, seq + 1)).refs
    source.store.free(ref)


def test_a_lost_sample_is_replaced(source):
    plain = next(iter(read(source)))
    lose(source, 1)
    threading.Timer(0.05, source.worker.run_once).start()
    reader = read(source)
    batch = next(iter(reader))
    assert batch["sample_ids"] == ["run:s0", "run:s1"]
    assert torch.equal(batch["last_hidden_state"], plain["last_hidden_state"])
    assert source.recaptured() == [1]
    reader.discard()


def test_a_sample_that_is_given_up_keeps_its_place(source):
    def fail(seqs, attempt):
        if seqs == (1,):
            raise OSError("broken")

    source.worker.feed.before = fail
    lose(source, 1)
    stop = threading.Event()
    producing = threading.Thread(target=source.worker.run, args=(stop.is_set,))
    producing.start()
    reader = read(source)
    batches = iter(reader)
    first, second = next(batches), next(batches)
    stop.set()
    producing.join(5)
    assert first["sample_ids"] == ["run:s0", "skipped"]
    assert first["input_ids"].shape == (2, PLACEHOLDER_TOKENS)
    assert not first["loss_mask"][1].any()
    assert first["window_num_tokens"] == second["window_num_tokens"] == sum(2 + seq % 3 for seq in range(4))
    assert dict(source.skipped()) == {1: "capture failed: broken"}
    assert reader.release(4) == [0, 1, 2, 3]


def test_what_was_read_is_held_until_its_step_was_applied(source, store):
    reader = read(source)
    batches = iter(reader)
    for _ in range(3):
        next(batches)
    assert store.health()["num_samples"] == 12
    assert reader.release(4) == [0, 1, 2, 3]
    assert store.health()["num_samples"] == 8
    reader.discard()  # read and not used, and not read, of the second window
    assert store.health()["num_samples"] == 4


def test_ranks_read_their_shares(source):
    names = [next(iter(read(source, rank=rank, world_size=2)))["sample_ids"] for rank in range(2)]
    assert names == [["run:s0", "run:s1"], ["run:s2", "run:s3"]]


class Recording(Eagle3Module):
    """Keeps the last gradients."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def fit(target_path, prompts, target, folder, positions, micro_batch_size=1) -> Recording:
    source, order = OnlineSource(prompts[0], target), PassOrder(len(prompts[0]), 0)
    skip_ids = [prompts[0][order.locate(position)[0]].source_id for position in positions]
    data = DataFlowDataModule(source, global_batch_size=4, micro_batch_size=micro_batch_size, skip_ids=skip_ids)
    module = Recording(str(target_path), draft_vocab_size=64, num_steps=2, lr=1e-2)
    steps = 4 // micro_batch_size
    limits = {"max_steps": 1, "max_epochs": 1, "limit_train_batches": steps, "accumulate_grad_batches": steps}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    L.Trainer(accelerator="cpu", default_root_dir=folder, **limits, **quiet).fit(module, data)
    assert source.store.health()["num_samples"] == 0
    assert data.skipped() == dict.fromkeys(positions, "listed in skip_ids")
    return module


def test_a_skipped_sample_has_no_weight(target_path, prompts, target, tmp_path):
    """Alone in its micro-batch or beside another, it changes neither loss nor gradient."""
    alone = fit(target_path, prompts, target, tmp_path, (1, 3))
    beside = fit(target_path, prompts, target, tmp_path, (1, 3), micro_batch_size=2)
    assert float(alone.step_losses[0]) > 0
    assert float(alone.step_losses[0]) == pytest.approx(float(beside.step_losses[0]), rel=1e-5)
    for name, gradient in alone.gradients.items():
        assert (gradient - beside.gradients[name]).abs().max() < 1e-5 * gradient.abs().max() + 1e-9, name


def test_a_window_of_skipped_samples_alone_is_a_step_of_nothing(target_path, prompts, target, tmp_path):
    module = fit(target_path, prompts, target, tmp_path, (0, 1, 2, 3))
    assert [float(loss) for loss in module.step_losses] == [0.0]
    assert all(gradient.abs().max() == 0 for gradient in module.gradients.values())


def test_a_feed_is_what_the_card_says():
    (sample,) = SeqFeed().capture([3], 0, [3])
    assert tuple(sample.put(MemoryFeatureStore()).features) == SeqFeed.card.features


def test_a_rank_that_outlives_rank_0_leaves_its_features_to_the_resume(tmp_path):
    plane, store = memory_plane(tmp_path), SharedDirFeatureStore(tmp_path / "store")
    worker = make_worker(plane, store)
    own = ControlPlane(run_id="run", ledger=plane.ledger, channel=memory_plane(tmp_path).log)
    first, second = make_source(plane, store), make_source(own, store)
    first.begin(PLAN, 0, 2)
    second.begin(PLAN, 1, 2)
    for _ in range(12):
        worker.run_once()
    reader = read(second, rank=1, world_size=2)
    next(iter(reader))
    reader.discard()
    second.finish("failed: connection closed by peer")
    assert store.health()["num_samples"] == 12
    first.finish("interrupted")
    assert store.health()["num_samples"] == 0
