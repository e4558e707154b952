"""Captures that fail: what is tried again, skipped or given up, and what ends the worker."""

from collections.abc import Collection
from dataclasses import replace

import pytest
import torch

from lightning_dataflow.contracts import CaptureMismatchError, NotFiniteError, PeerTimeoutError
from lightning_dataflow.control.heartbeat import producer_failures
from lightning_dataflow.data import StreamingRefQueue
from lightning_dataflow.producers import PromptFeed
from lightning_dataflow.producers.feeds import to_put
from lightning_dataflow.stores import MemoryFeatureStore, StoreUnavailableError
from tests.records import CAPTURE, WIDE, begin, failures, make_origin
from tests.streams import SeqFeed, make_tensors, make_worker
from tests.unit.producers.workers import records, until_idle


def feed_that_fails(on, error):
    def before(seqs, attempt):
        if on(seqs, attempt):
            raise error

    return SeqFeed(before)


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
