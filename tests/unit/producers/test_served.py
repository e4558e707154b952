"""Producers whose features come from servers: a real ledger, log and store, and servers that fail on demand."""

# ruff: noqa: F811 (fixtures)
import threading
import time

import pytest

from lightning_dataflow.producers import rollout
from lightning_dataflow.producers.feeds import ServedFeed
from lightning_dataflow.run import producer
from lightning_dataflow.run.producer import run_all
from tests.records import begin, failures, memory_plane
from tests.streams import SeqFeed, make_worker
from tests.unit.targets.capture_servers import answer_with
from tests.unit.targets.conftest import connect, servers, store  # noqa: F401 (fixtures)

pytestmark = pytest.mark.integration  # servers that come and go

NUM_SAMPLES = 12


@pytest.fixture
def start(tmp_path, connect, store, prompts):
    """Workers as `role=producer` makes them, and the ledger of their run, which has begun."""

    def make(num_workers: int = 4, **options):
        engine = connect(**options)
        planes = [memory_plane(tmp_path)] * num_workers
        feed = ServedFeed(prompts[0], engine, seed=0, run_id="run")
        workers = [make_worker(plane, store, feed, name=f"producer-{i}") for i, plane in enumerate(planes)]
        begin(planes[0], stop=NUM_SAMPLES)
        return workers, planes[0]

    return make


def records(plane):
    plane.log.rewind()
    return plane.log.poll(10_000)


def capture_all(workers, plane) -> list:
    running = threading.Thread(target=run_all, args=(workers,), daemon=True)
    running.start()
    deadline = time.monotonic() + 60
    while len({one.seq for one in records(plane) if one.ref is not None}) < NUM_SAMPLES:
        assert time.monotonic() < deadline, failures(plane.ledger) or plane.ledger.status()
        time.sleep(0.05)
    plane.ledger.finish("completed")
    running.join(10)
    return records(plane)


def test_a_server_that_dies_costs_no_prompt_a_try_and_its_prompts_are_a_new_attempt(start, servers, store):
    workers, plane = start()
    servers[0].dead = True
    found = capture_all(workers, plane)
    assert "skip" not in {one.kind for one in found}
    assert max(one.ref.origin.attempt for one in found if one.ref is not None) >= 1
    assert servers[1].num_captures == 1 + NUM_SAMPLES
    assert [
        len({request.attempt for request in servers[1].requests if request.sample_id == one.ref.sample_id})
        for one in found
        if one.ref
    ] == [1] * NUM_SAMPLES
    assert store.health()["num_samples"] == NUM_SAMPLES


def test_a_server_with_a_broken_store_does_not_end_a_run_that_has_another(start, servers):
    workers, plane = start()
    servers[0].alter = answer_with(error="store", message="broken")
    found = capture_all(workers, plane)
    assert [one.kind for one in found if one.kind == "skip"] == failures(plane.ledger) == []
    assert plane.ledger.status()["given_up"] == 0


def test_a_poison_prompt_is_skipped_and_the_run_goes_on(start, servers):
    workers, plane = start(1)
    poison = f"run:{workers[0].feed.tasks([3], 0)[0].task_id}"
    for server in servers:
        server.alter = lambda answer: (
            {"error": "failed", "message": "CUDA error"}
            if answer.get("ref", {}).get("origin", {}).get("sample_id") == poison
            else answer
        )
    while workers[0].run_once() != "idle":
        pass
    found = records(plane)
    assert [(one.seq, one.reason.rpartition(": ")[2]) for one in found if one.kind == "skip"] == [(3, "CUDA error")]
    assert plane.ledger.status()["given_up"] == 1


@pytest.mark.integration
def test_a_full_store_is_waited_for_with_growing_pauses_and_the_same_attempt(start, servers, monkeypatch):
    (worker,), plane = start(1, urls=[servers[0].url])
    servers[0].requests.clear()
    servers[0].alter = answer_with(error="full", message="no room")
    threading.Timer(2.0, lambda: setattr(servers[0], "alter", dict)).start()
    assert worker.run_once() == "captured"
    assert len(servers[0].requests) < 15
    assert {request.attempt for request in servers[0].requests} == {0}
    monkeypatch.setattr(worker, "lease_s", 0.2)
    servers[0].alter = answer_with(error="full", message="no room")
    assert worker.run_once() == "idle"
    assert plane.ledger.status()["given_up"] == 0


def test_an_error_of_one_worker_does_not_wait_for_the_others_servers(start, servers, monkeypatch):
    workers, plane = start()
    monkeypatch.setattr(rollout, "MAX_FAILURES", 1)
    servers[0].hung.set()
    servers[1].alter = answer_with(error="failed", message="CUDA error")
    began = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="CUDA error"):
            run_all(workers)
        assert time.monotonic() - began < 5
    finally:
        servers[0].hung.clear()
    assert plane.ledger.status()["leased"] == 0


def test_a_worker_that_does_not_end_is_named(tmp_path, store, monkeypatch, caplog):
    plane, stuck, ended = memory_plane(tmp_path), threading.Event(), threading.Event()
    begin(plane)
    monkeypatch.setattr(producer, "END_S", 0.3)

    def wait_or_fail(seqs, attempt):
        if not stuck.is_set():
            stuck.set()
            ended.wait(5)
        raise ValueError("bad")

    monkeypatch.setattr(rollout, "MAX_FAILURES", 1)
    began = time.monotonic()
    with pytest.raises(ValueError, match="bad"):
        run_all([make_worker(plane, store, SeqFeed(wait_or_fail), name=f"producer-{i}") for i in range(2)])
    assert time.monotonic() - began < 4
    (shown,) = caplog.messages
    assert shown.startswith("gave up on producer-") and ": it was capturing seq " in shown
    ended.set()


def test_a_sample_that_a_server_finds_broken_is_skipped_and_no_fault_of_the_server(start, servers, prompts):
    workers, plane = start(1)
    broken = prompts[0].task(workers[0].feed.locate(5)[0], 0, run_id="run", target_model_version="")

    def alter(answer):
        is_broken = answer["ref"]["origin"]["sample_id"] == f"run:{broken.task_id}"
        return {"error": "not_finite", "message": "aux_hidden_states (layer 3)"} if is_broken else answer

    for server in servers:
        server.alter = alter
    while workers[0].run_once() == "captured":
        pass
    (skip,) = [one for one in records(plane) if one.kind == "skip"]
    assert (skip.seq, skip.num_tokens) == (5, len(broken.payload["input_ids"]))
    assert skip.reason == f"aux_hidden_states (layer 3) of sample {broken.source_id} holds NaN or infinity"
    assert plane.ledger.status()["given_up"] == 1
