"""The drive loop of a producer, over a real ledger, log and store."""

import threading
import time
from collections.abc import Collection
from dataclasses import replace

import pytest
import torch

from lightning_dataflow.contracts import CaptureMismatchError, CaptureSpec, NotFiniteError, PeerTimeoutError, UserError
from lightning_dataflow.control import Watermarks, heartbeat as heartbeat_module
from lightning_dataflow.control.heartbeat import producer_failures
from lightning_dataflow.data import StreamingRefQueue
from lightning_dataflow.producers import PromptFeed, rollout as rollout_module
from lightning_dataflow.producers.feeds import to_put
from lightning_dataflow.stores import MemoryFeatureStore, StoreUnavailableError
from tests.records import CAPTURE, WIDE, begin, failures, make_origin, memory_plane
from tests.streams import SeqFeed, make_tensors, make_worker


@pytest.fixture
def plane(tmp_path):
    return memory_plane(tmp_path)


@pytest.fixture
def store():
    return MemoryFeatureStore()


def until_idle(worker) -> list[str]:
    states = []
    while (state := worker.run_once()) != "idle":
        states.append(state)
    return states


def records(plane):
    plane.log.rewind()
    return [(one.kind, one.seq) for one in plane.log.poll(10_000) if one.kind != "end"]


def test_a_worker_ends_the_leases_of_a_dead_process_that_had_its_name(plane, store):
    """A container that is started again has the host name and the process id of the one before."""
    begin(plane, stop=8)
    dead = make_worker(plane, store, group=4)
    plane.lease(dead.name, group=4, num_bytes=dead.feed.num_bytes, watermarks=WIDE, lease_s=30.0)
    worker = make_worker(plane, store, group=4)
    worker.run(lambda: worker.num_captured == 8 or worker.state == "all captured")
    assert worker.feed.captured == [((0, 1, 2, 3), 1), ((4, 5, 6, 7), 0)]


def feed_that_fails(on, error):
    def before(seqs, attempt):
        if on(seqs, attempt):
            raise error

    return SeqFeed(before)


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


def test_a_capture_that_fails_once_is_tried_again(plane, store):
    begin(plane, stop=8)
    worker = make_worker(
        plane, store, feed_that_fails(lambda seqs, attempt: seqs[0] == 0 and not attempt, OSError("flaky")), group=4
    )
    assert until_idle(worker) == ["failed", "captured", "captured"]
    assert worker.feed.captured == [((0, 1, 2, 3), 1), ((4, 5, 6, 7), 0)]
    assert records(plane)[0] == ("supersede", 0)


def test_a_sample_that_always_fails_is_skipped_and_the_others_go_on(plane, store):
    begin(plane, stop=6)
    worker = make_worker(plane, store, feed_that_fails(lambda seqs, attempt: 2 in seqs, ValueError("too long")), group=2)
    assert sorted(until_idle(worker)) == ["captured"] * 2 + ["failed"] * 3
    assert [one for one in records(plane) if one[0] == "skip"] == [("skip", 2), ("skip", 3)]
    plane.log.rewind()
    assert {one.reason for one in plane.log.poll() if one.kind == "skip"} == {"capture failed: too long"}
    assert store.health()["num_samples"] == plane.ledger.status()["refs_in_flight"] == 4


class BrokenFeed(SeqFeed):
    """Features of the seqs in `bad` hold NaN in their second layer."""

    bad: Collection[int] = ()

    def capture(self, seqs, attempt, wanted):
        self.captured.append((tuple(seqs), attempt))
        for seq in wanted:
            tensors = make_tensors(seq)
            if seq in self.bad:
                tensors["aux_hidden_states"][0, -1] = float("nan")
            yield to_put(seq, replace(make_origin(seq, attempt), capture=replace(CAPTURE, layer_ids=(1, 3))), tensors)


def test_a_sample_with_nan_is_skipped_at_once_and_keeps_its_tokens(plane, store, caplog):
    begin(plane, stop=6)
    feed = BrokenFeed()
    feed.bad = (2, 4)
    worker = make_worker(plane, store, feed, group=3)
    assert until_idle(worker) == ["captured"] * 2
    plane.log.rewind()
    found = {one.seq: one for one in plane.log.poll() if one.kind != "end"}
    assert {seq: one.kind for seq, one in found.items()} == {seq: "skip" if seq in (2, 4) else "ref" for seq in range(6)}
    for seq in (2, 4):
        reason = f"aux_hidden_states (layer 3) of sample {make_origin(seq).source_id} holds NaN or infinity"
        assert (found[seq].reason, found[seq].num_tokens) == (reason, make_origin(seq).num_tokens)
        assert f"skipped: {reason}" in caplog.text
    status = plane.ledger.status()
    assert (status["given_up"], status["published"], status["refs_in_flight"]) == (2, 4, 4)
    assert status["bytes_in_flight"] == store.health()["num_bytes"]
    plane.log.rewind()
    queue = StreamingRefQueue(plane, idle_timeout_s=5.0)
    assert queue.num_tokens(2) == make_origin(2).num_tokens


@pytest.mark.parametrize(("length", "first"), [(300, 8), (5, 5)])
def test_a_target_that_gives_nothing_else_ends_the_worker_at_once(plane, store, length, first):
    begin(plane, stop=12)
    feed = BrokenFeed(length=length)
    feed.bad = range(12)
    with pytest.raises(
        NotFiniteError, match=rf"aux_hidden_states \(layer 3\) of .* all of the first {first} samples: check"
    ):
        until_idle(make_worker(plane, store, feed))
    assert len(feed.captured) == first
    assert plane.ledger.status()["leased"] == 0


def test_a_few_broken_samples_at_the_start_do_not_end_it(plane, store):
    begin(plane, stop=20)
    feed = BrokenFeed()
    feed.bad = {*range(7), *range(8, 20)}
    assert until_idle(make_worker(plane, store, feed)) == ["captured"] * 20


def test_a_prompt_that_kills_its_producer_every_time_is_given_up(plane, store):
    """Three die of the first group; the fourth skips it and goes on."""
    begin(plane, stop=8)
    for name in ("a", "b", "c"):
        plane.ledger.lease(name, group=2, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=-1)
    worker = make_worker(plane, store, group=2)
    assert until_idle(worker) == ["captured"] * 3
    assert records(plane) == [("skip", 0), ("skip", 1)] + [("ref", seq) for seq in range(2, 8)]
    plane.log.rewind()
    assert plane.log.poll()[0].reason == "given up after 3 tries, the last of which ended or stopped its producer"
    assert plane.ledger.status()["given_up"] == 2


def test_a_store_that_stays_away_ends_the_worker_and_counts_against_no_sample(plane, store, monkeypatch):
    begin(plane, stop=4)

    def away(*arguments):
        raise StoreUnavailableError("Mooncake master 10.0.0.1:1 did not answer")

    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(store, "put", away)
            patch.setattr(store, "free", away)
            with pytest.raises(StoreUnavailableError):
                make_worker(plane, store).run()
    assert plane.ledger.status()["leased"] == 0
    assert until_idle(make_worker(plane, store)) == ["captured"] * 4
    assert {kind for kind, _ in records(plane)} == {"ref", "supersede"}


class HalfStored(MemoryFeatureStore):
    """Each put fails after the features became visible."""

    def put(self, tensors, origin):
        super().put(tensors, origin)
        raise OSError("connection reset")


def test_what_a_failed_put_left_in_the_store_is_removed(plane):
    begin(plane, stop=1)
    store = HalfStored()
    assert make_worker(plane, store).run_once() == "failed"
    assert store.health()["num_samples"] == 0


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


def test_what_may_have_been_published_is_not_freed(plane, store, monkeypatch):
    """A ledger that stops answering during `publish` may have published; the restart frees what it has not."""
    begin(plane)
    worker = make_worker(plane, store)

    def publish(plane, lease, refs, skips):
        raise PeerTimeoutError("no answer")

    monkeypatch.setattr(type(plane), "publish", publish)
    with pytest.raises(PeerTimeoutError):
        worker.run_once()
    assert store.health()["num_samples"] == 1
    assert plane.lease("other", group=1, num_bytes=lambda seq: 8, watermarks=worker.watermarks, lease_s=60.0).tries == 0


def test_an_error_of_every_capture_ends_the_worker(plane, store):
    begin(plane)
    worker = make_worker(plane, store, feed_that_fails(lambda seqs, attempt: True, RuntimeError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        worker.run()
    assert failures(plane.ledger) == ["producer-0: CUDA out of memory"]
    assert plane.ledger.status()["leased"] == store.health()["num_samples"] == 0


def test_an_interrupted_worker_gives_its_lease_back_and_is_no_failure(plane, store):
    begin(plane)
    worker = make_worker(plane, store, feed_that_fails(lambda seqs, attempt: True, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    assert failures(plane.ledger) == []
    assert plane.ledger.status()["leased"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_ids": (1,)}, r"captures .*layer_ids=\(1, 3, 4\).*, the run was announced with .*layer_ids=\(1,\)"),
        ({"hidden_size": 32}, r"captures .*hidden_size=64.*, the run was announced with .*hidden_size=32"),
        ({"norm": "pre"}, r"captures .*norm='post'.*, the run was announced with .*norm='pre'"),
    ],
)
def test_a_target_that_captures_something_else(plane, store, prompts, target, change, message):
    feed = PromptFeed(prompts[0], target, seed=0, run_id="run")
    feed.card = replace(feed.card, capture=replace(feed.card.capture, **change))
    begin(plane)
    with pytest.raises(CaptureMismatchError, match=message):
        make_worker(plane, store, feed).run_once()
    assert plane.ledger.status()["leased"] == store.health()["num_samples"] == 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [], "returned 0 samples for 2 prompts"),
        (lambda n: [{"aux_hidden_states": torch.zeros(3, 192)}] * n, r"captured .* expected"),
        (
            lambda n: [{"aux_hidden_states": torch.zeros(3, 192).half(), "last_hidden_state": torch.zeros(3, 64)}] * n,
            r"float16.* expected .*float32",
        ),
    ],
)
def test_a_target_that_returns_something_else(plane, store, prompts, target, monkeypatch, returned, message):
    monkeypatch.setattr(target, "capture", lambda batch: returned(len(batch)))
    begin(plane)
    worker = make_worker(plane, store, PromptFeed(prompts[0], target, seed=0, run_id="run"), group=2)
    with pytest.raises(CaptureMismatchError, match=message):
        worker.run()
    assert store.health()["num_samples"] == 0
    assert producer_failures(plane.ledger) == failures(plane.ledger)
    assert "expected" in failures(plane.ledger)[0] or "samples for" in failures(plane.ledger)[0]


def test_producers_of_one_run_must_agree(tmp_path, store):
    make_worker(memory_plane(tmp_path), store)
    other = SeqFeed()
    other.card = replace(SeqFeed.card, capture=CaptureSpec(layer_ids=(2,), norm="post", hidden_size=2))
    assert other.card.capture != CAPTURE
    with pytest.raises(UserError, match=r"another card\.capture\.layer_ids \(\[0\], here \[2\]\)"):
        make_worker(memory_plane(tmp_path), store, other)
    with pytest.raises(UserError, match=r"another capture_batch_size \(1, here 4\)"):
        make_worker(memory_plane(tmp_path), store, group=4)


def test_a_full_store_is_waited_for(plane):
    size = SeqFeed().num_bytes(2)
    store = MemoryFeatureStore(capacity_bytes=2 * size)
    begin(plane, stop=8)
    worker = make_worker(plane, store)
    done = threading.Thread(target=until_idle, args=(worker,))
    done.start()
    plane.log.rewind()
    read = []
    while len(read) < 8:
        for record in (record for record in plane.log.poll() if record.ref is not None):
            time.sleep(0.02)
            store.free(record.ref)
            plane.ledger.free([record.seq])
            read.append(record.seq)
    done.join(5)
    assert read == list(range(8))
    assert plane.ledger.status()["given_up"] == 0


def test_a_store_that_stays_full_counts_against_no_sample(plane):
    store = MemoryFeatureStore(capacity_bytes=SeqFeed().num_bytes(2))
    begin(plane, stop=8)
    worker = make_worker(plane, store, group=4, lease_s=0.01)
    for _ in range(5):
        assert worker.run_once() == "idle"
        assert worker.state == "waiting for room in the store"
        assert store.health()["num_samples"] == 0
    assert records(plane) == []
    store.capacity_bytes = None
    assert worker.run_once() == "captured"


def test_capture_pauses_above_the_watermark(plane, store):
    begin(plane, stop=40, window=2)
    bound = Watermarks(high_refs=6, low_refs=2, high_bytes=1 << 40, low_bytes=1 << 39)
    worker = make_worker(plane, store, watermarks=bound, group=2)
    assert until_idle(worker) == ["captured"] * 3
    plane.ledger.free([0, 1])
    plane.ledger.ack(2, 1)
    assert worker.run_once() == "idle"
    plane.ledger.free([2, 3])
    plane.ledger.ack(4, 2)
    assert until_idle(worker) == ["captured"] * 2
    assert worker.state == "waiting for the trainer to free samples"


def test_windows_that_fit_below_no_watermark_are_refused(plane, store):
    few = Watermarks(high_refs=6, low_refs=2, high_bytes=1 << 40, low_bytes=1 << 39)
    begin(plane, stop=40, window=8)
    with pytest.raises(
        UserError, match=r"a window can have 8 refs, the high watermark is 6 refs: raise topology\.high_refs"
    ):
        make_worker(plane, store, watermarks=few).run_once()
    begin(plane, stop=40, window=4)
    with pytest.raises(UserError, match="a window can have 11 refs"):  # the group in which a window ends sticks out
        make_worker(memory_plane(plane.log.name + "/b"), store, watermarks=few, group=8)._check_windows(plane.ledger.plan())
    assert plane.ledger.status()["leased"] == 0
    begin(plane, stop=2, window=4)
    assert make_worker(plane, store, watermarks=few).run_once() == "captured"
    largest = sum(sorted(SeqFeed().sizes)[-4:])
    for size, fits in ((largest, True), (largest - 1, False)):
        small = Watermarks(high_refs=100, low_refs=1, high_bytes=size, low_bytes=1)
        begin(plane, stop=40, window=4)
        worker = make_worker(plane, store, watermarks=small)
        if fits:
            worker.run_once()
            continue
        with pytest.raises(UserError, match=rf"a window can have {largest} bytes"):
            worker.run_once()


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


def test_a_trainer_that_vanishes(plane, store):
    begin(plane, stop=2)
    plane.ledger.report("trainer-0", "training")
    worker = make_worker(plane, store, peer_timeout_s=0.2)
    with pytest.raises(PeerTimeoutError, match=r"trainer-0 on .* gave no sign of life for 0 s \(it was training\)"):
        worker.run()
    assert worker.num_captured == 2


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
