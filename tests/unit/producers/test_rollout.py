"""The drive loop of a producer, over a real ledger, log and store."""

import threading
import time
from dataclasses import replace

import pytest

from lightning_dataflow.contracts import CaptureSpec, PeerTimeoutError, UserError
from lightning_dataflow.control import heartbeat as heartbeat_module
from lightning_dataflow.data import StreamingRefQueue
from lightning_dataflow.producers import PromptFeed, rollout as rollout_module
from tests.records import CAPTURE, WIDE, begin, memory_plane
from tests.streams import SeqFeed, make_worker
from tests.unit.producers.workers import records, until_idle


def test_a_worker_ends_the_leases_of_a_dead_process_that_had_its_name(plane, store):
    """A container that is started again has the host name and the process id of the one before."""
    begin(plane, stop=8)
    dead = make_worker(plane, store, group=4)
    plane.lease(dead.name, group=4, num_bytes=dead.feed.num_bytes, watermarks=WIDE, lease_s=30.0)
    worker = make_worker(plane, store, group=4)
    worker.run(lambda: worker.num_captured == 8 or worker.state == "all captured")
    assert worker.feed.captured == [((0, 1, 2, 3), 1), ((4, 5, 6, 7), 0)]


def test_all_samples_are_captured_in_groups(plane, store):
    worker = make_worker(plane, store, group=4)
    assert worker.run_once() == "idle"  # no trainer yet
    begin(plane, stop=10)
    assert until_idle(worker) == ["captured"] * 3
    assert worker.feed.captured == [((0, 1, 2, 3), 0), ((4, 5, 6, 7), 0), ((8, 9), 0)]
    assert records(plane) == [("ref", seq) for seq in range(10)]
    assert worker.num_captured == store.health()["num_samples"] == 10
    status = plane.ledger.status()
    assert (status["refs_in_flight"], status["bytes_in_flight"]) == (10, store.health()["num_bytes"])


def test_only_what_is_wanted_of_a_group_is_published(plane, store):
    begin(plane, start=2, stop=4)
    worker = make_worker(plane, store, group=4)
    until_idle(worker)
    assert worker.feed.captured == [((0, 1, 2, 3), 0)]
    assert records(plane) == [("ref", 2), ("ref", 3)]
    assert store.health()["num_samples"] == 2


def test_a_reader_that_wants_more_than_was_planned_ends_with_the_producers(plane, store):
    """The last of two workers to publish says where the log ends; nobody waits for the timeout."""
    begin(plane, stop=4)
    workers = [make_worker(plane, store, name=f"producer-{index}", group=2) for index in range(2)]
    assert [worker.run_once() for worker in workers] == ["captured"] * 2
    assert "end" not in {record.kind for record in plane.log.poll()}
    assert [worker.run_once() for worker in workers] == ["idle"] * 2
    plane.log.rewind()
    assert [record.seq for record in plane.log.stream(idle_timeout_s=0.0)] == [0, 1, 2, 3, 4]
    plane.log.rewind()
    queue = StreamingRefQueue(plane, idle_timeout_s=60.0)
    queue.get(range(4), range(4))
    with pytest.raises(UserError, match="ends at seq 4, the next window needs seqs up to 8"):
        queue.get(range(4, 8), range(4, 8))


def test_producers_of_one_run_must_agree(tmp_path, store):
    make_worker(memory_plane(tmp_path), store)
    other = SeqFeed()
    other.card = replace(SeqFeed.card, capture=CaptureSpec(layer_ids=(2,), norm="post", hidden_size=2))
    assert other.card.capture != CAPTURE
    with pytest.raises(UserError, match=r"another card\.capture\.layer_ids \(\[0\], here \[2\]\)"):
        make_worker(memory_plane(tmp_path), store, other)
    with pytest.raises(UserError, match=r"another capture_batch_size \(1, here 4\)"):
        make_worker(memory_plane(tmp_path), store, group=4)


def test_a_commit_that_went_to_another_attempt_frees_its_features(plane, store):
    begin(plane, stop=2)
    other = make_worker(plane, store, name="other", group=2)

    def overtake(seqs, attempt):
        if attempt == 0:
            assert other.run_once() == "captured"

    worker = make_worker(plane, store, SeqFeed(overtake), group=2, lease_s=-1.0)
    assert worker.run_once() == "captured"
    assert (worker.num_captured, other.num_captured) == (0, 2)
    assert records(plane) == [("supersede", 0), ("supersede", 1)]
    assert store.health()["num_samples"] == 2
    plane.log.rewind()
    assert store.exists([one.ref for one in plane.log.poll()]) == [True, True]


def test_a_trainer_that_never_begins(plane, store):
    worker = make_worker(plane, store, peer_timeout_s=0.05)
    with pytest.raises(PeerTimeoutError, match=r"waited 0 s for a trainer to begin in .*: start one with role=trainer"):
        worker.run()


def test_a_trainer_that_vanishes(plane, store, monkeypatch):
    """The producer reads the reports alone, ten times a second: not what all samples in flight are."""
    begin(plane, stop=2)
    status, calls = plane.ledger.status, []
    monkeypatch.setattr(plane.ledger, "status", lambda: calls.append(0) or status())
    plane.ledger.report("trainer-0", "training")
    worker = make_worker(plane, store, peer_timeout_s=0.2)
    with pytest.raises(PeerTimeoutError, match=r"trainer-0 on .* gave no sign of life for 0 s \(it was training\)"):
        worker.run()
    assert worker.num_captured == 2
    assert len(calls) <= 1, "at the end of the log"


def test_the_end_of_the_run_ends_the_worker_and_leaves_nothing(plane, store):
    begin(plane, stop=8)
    worker = make_worker(plane, store, SeqFeed(lambda seqs, attempt: seqs[0] == 4 and plane.ledger.finish("completed")))
    worker.run()
    assert worker.feed.captured[-1] == ((4,), 0)
    assert store.health()["num_samples"] == 4  # published before the end: the trainer's to free
    assert plane.ledger.status()["parts"][0]["state"] == "finished"


def test_a_run_that_finished_before_is_waited_for_again(plane, store, monkeypatch):
    begin(plane, stop=2)
    plane.ledger.finish("interrupted")
    monkeypatch.setattr(rollout_module, "LOADED_AT", time.time() + 0.01)
    worker = make_worker(plane, store)
    assert worker.run_once() == "idle"
    begin(plane, stop=2)
    assert until_idle(worker) == ["captured"] * 2


def test_should_stop_ends_the_loop(plane, store):
    begin(plane)
    worker = make_worker(plane, store)
    worker.run(lambda: worker.num_captured >= 5)
    assert worker.num_captured == 5


def test_a_heartbeat_keeps_a_slow_capture_alive(plane, store, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "EVERY_S", 0.02)
    begin(plane, stop=1)
    worker = make_worker(plane, store, SeqFeed(lambda seqs, attempt: time.sleep(0.3)), lease_s=0.1)
    slow = threading.Thread(target=worker.run)
    slow.start()
    time.sleep(0.2)
    assert make_worker(plane, store, name="other").run_once() == "idle"
    plane.ledger.report("other", "done")
    while not worker.num_captured:
        time.sleep(0.01)
    plane.ledger.finish("completed")
    slow.join(5)
    assert records(plane) == [("ref", 0)]


def test_prompts_are_captured_by_the_real_target(plane, store, prompts, target):
    feed = PromptFeed(prompts[0], target, seed=3, run_id="run")
    begin(plane, stop=6)
    worker = make_worker(plane, store, feed, group=2)
    assert until_idle(worker) == ["captured"] * 3
    plane.log.rewind()
    for record in plane.log.poll()[:6]:
        tensors, _ = store.get(record.ref)
        index, _ = feed.locate(record.seq)
        assert tensors["input_ids"].tolist() == list(prompts[0][index].input_ids)
        assert record.ref.num_bytes == feed.num_bytes(record.seq) == feed.sizes[index]
