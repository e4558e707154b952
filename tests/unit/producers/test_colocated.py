"""Target and trainer in one process over the full control plane: the same bits as `online`."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from lightning_dataflow.contracts import waiting
from lightning_dataflow.control import RunPlan
from lightning_dataflow.data import DataFlowDataModule, PassOrder, SampleRows, queue as queue_module
from lightning_dataflow.producers import ColocatedSource, OnlineSource, colocated as colocated_module
from lightning_dataflow.stores import MemoryFeatureStore
from tests.records import WIDE, memory_plane, rank_slice

PLAN = RunPlan(start=8, stop=32, window=8)
FEATURES = ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state")


@pytest.fixture(autouse=True)
def look_at_peers_at_once(monkeypatch):
    monkeypatch.setattr(queue_module, "CHECK_PEERS_S", 0.0)


@pytest.fixture(params=[False, True], ids=["in turn", "threaded"])
def threaded(request) -> bool:
    return request.param


def make(prompts, target, folder, threaded, store=None, **options) -> ColocatedSource:
    plane = memory_plane(folder)
    store = store or MemoryFeatureStore()
    settings = {"seed": 0, "idle_timeout_s": 20.0, "threaded": threaded} | options
    return ColocatedSource(prompts[0], target, plane, store, WIDE, **settings)


def read(source, window: int, rank: int = 0, world_size: int = 1) -> list[dict[str, torch.Tensor]]:
    seqs = range(8 * window, 8 * window + 8)
    found = source.window(seqs, rank_slice(window, 8, rank, world_size))
    samples = []
    for seq, ref in zip(rank_slice(window, 8, rank, world_size), found.refs, strict=True):
        tensors, handle = source.store.get(ref)
        samples.append({**tensors, "seq": seq, "window": found.num_tokens})
        source.store.release(handle)
    source.applied([one["seq"] for one in samples], seqs.stop, window + 1)
    return samples


@pytest.mark.integration
@pytest.mark.parametrize("capture_batch_size", [1, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_it_yields_the_bits_of_online(prompts, target, tmp_path, threaded, rank, capture_batch_size):
    colocated = make(prompts, target, tmp_path, threaded, capture_batch_size=capture_batch_size)
    online = OnlineSource(prompts[0], target, capture_batch_size=capture_batch_size)
    online.order = PassOrder(len(online), 0)
    expected = [read(online, window, rank, 2) for window in range(1, 4)]  # before a thread uses the target
    colocated.begin(PLAN, rank, 2)
    found = [read(colocated, window, rank, 2) for window in range(1, 4)]
    colocated.finish("completed")
    for samples, others in zip(found, expected, strict=True):
        for one, other in zip(samples, others, strict=True):
            assert (one["seq"], one["window"]) == (other["seq"], other["window"])
            assert all(torch.equal(one[name], other[name]) for name in FEATURES)
    assert colocated.in_flight() == {"refs_in_flight": 0, "bytes_in_flight": 0}
    assert colocated.store.health()["num_samples"] == 0


@pytest.mark.integration
@pytest.mark.parametrize("positions", [(), (1, 8, 9)])
def test_through_the_data_module(prompts, target, tmp_path, threaded, positions):
    """Also with samples that are listed in skip_ids."""
    order = PassOrder(len(prompts[0]), 0)
    skip_ids = [prompts[0][order.locate(seq)[0]].source_id for seq in positions]

    class Fit:  # what `start` and `batches` ask of a Trainer
        checkpoint_callbacks = ()
        global_rank, world_size, max_steps, global_step = 0, 1, 3, 0
        lightning_module = SimpleNamespace(collate=SampleRows.stack)

        class strategy:
            root_device = torch.device("cpu")
            barrier = staticmethod(lambda name: None)

    batches = []
    for source in (OnlineSource(prompts[0], target), make(prompts, target, tmp_path, threaded)):
        data = DataFlowDataModule(source, global_batch_size=8, micro_batch_size=4, skip_ids=skip_ids)
        data.trainer = Fit
        data.start(resumed=False)
        mine = []
        for batch in data.batches():
            mine.append(batch)
            if len(mine) % 2 == 0:
                data.mark_applied(batch["next_seq"], len(mine) // 2)
        data.teardown("fit")
        assert source.store.health()["num_samples"] == 0
        assert data.skipped().keys() == set(positions)
        batches.append(mine)
    for one, other in zip(*batches, strict=True):
        assert (one["next_seq"], one["window_num_tokens"]) == (other["next_seq"], other["window_num_tokens"])
        assert all(torch.equal(one[name], other[name]) for name in FEATURES)


def test_skipped_samples_are_read_while_others_are_skipped(prompts, target, tmp_path, monkeypatch):
    """The prefetch thread adds to them at any moment."""
    source = make(prompts, target, tmp_path, False)
    source.begin(PLAN, 0, 1)
    source.queue.skipped |= {8: "lost", 9: "lost"}
    number = source._run_seq

    def skip_another(seq):
        source.queue.skipped[len(source.queue.skipped) + 8] = "lost"
        return number(seq)

    monkeypatch.setattr(source, "_run_seq", skip_another)
    assert set(source.skipped()) == {8, 9}
    source.finish("completed")


def test_a_trainer_that_ends_first(prompts, target, tmp_path, threaded):
    source = make(prompts, target, tmp_path, threaded)
    source.begin(PLAN, 0, 1)
    read(source, 1)
    start = time.monotonic()
    source.cancel()
    source.finish("interrupted")
    assert time.monotonic() - start < 5
    assert source.store.health()["num_samples"] == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "producer"]


def test_a_full_store_does_not_hold_up_the_end(prompts, target, tmp_path):
    largest = max(len(prompt.input_ids) for prompt in prompts[0])
    store = MemoryFeatureStore(capacity_bytes=9 * largest * (4 * 64 * 4 + 9))
    source = make(prompts, target, tmp_path, True, store)
    source.begin(PLAN, 0, 1)
    source.window(range(8, 16), range(8, 16))
    while source._worker.state != "waiting for room in the store":
        time.sleep(0.01)
    start = time.monotonic()
    source.finish("interrupted")
    assert time.monotonic() - start < 5
    assert store.health()["num_samples"] == 0


def test_the_error_of_the_producer_is_raised_where_the_trainer_waits(prompts, target, tmp_path, threaded, monkeypatch):
    source = make(prompts, target, tmp_path, threaded)
    monkeypatch.setattr(target, "capture", lambda batch: (_ for _ in ()).throw(MemoryError("the target's")))
    source.begin(PLAN, 0, 1)
    with pytest.raises(MemoryError, match="the target's"):
        for window in range(1, 4):
            read_or_skip(source, window)
    source.finish("failed")
    assert source.store.health()["num_samples"] == 0


def read_or_skip(source, window: int) -> None:
    seqs = range(8 * window, 8 * window + 8)
    source.window(seqs, seqs)


def test_a_second_fit_after_an_error(prompts, target, tmp_path, threaded, monkeypatch):
    source = make(prompts, target, tmp_path, threaded)
    with monkeypatch.context() as patch:
        patch.setattr(target, "capture", lambda batch: (_ for _ in ()).throw(MemoryError("the target's")))
        source.begin(PLAN, 0, 1)
        with pytest.raises(MemoryError):
            read_or_skip(source, 1)
        source.finish("failed")
    source.begin(PLAN, 0, 1)
    assert source.in_flight() is not None
    source.finish("completed")


def test_a_capture_that_hangs_is_said(prompts, target, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.01)
    monkeypatch.setattr(colocated_module, "JOIN_TIMEOUT_S", 0.1)
    release = threading.Event()
    source = make(prompts, target, tmp_path, True)
    entered = threading.Event()
    monkeypatch.setattr(target, "capture", lambda batch: [entered.set(), release.wait()][:0])
    source.begin(PLAN, 0, 1)
    assert entered.wait(5)
    with pytest.raises(RuntimeError, match="the producer thread did not end within 0 s: it hangs in a capture"):
        source.finish("interrupted")
    release.set()
    assert "waiting for the producer thread to end its capture, for 0 s so far" in caplog.text
