"""Capture waits for room: in the store, and below the watermarks."""

import threading
import time

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control import Watermarks
from lightning_dataflow.stores import MemoryFeatureStore
from tests.records import begin, memory_plane
from tests.streams import SeqFeed, make_worker
from tests.unit.producers.workers import records, until_idle


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
