"""Mooncake between processes: freed samples are gone for all, and failures are noticed."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dataflow.contracts import CapacityError, SampleRef, ref_from_json, ref_to_json
from lightning_dataflow.services.mooncake import CLIENT_PAUSE_S, LocalMooncake
from lightning_dataflow.stores import MooncakeFeatureStore, StoreUnavailableError
from lightning_dataflow.stores.mooncake.admin import MooncakeAdmin
from tests.processes import ROOT, environment, nightly
from tests.unit.stores.samples import origin

STOOD_STILL_S = 16.0

PEER = """
import json, os, sys, time
from dataclasses import replace
import torch
from lightning_dataflow.contracts import ref_from_json, ref_to_json
from lightning_dataflow.stores import MooncakeFeatureStore
from lightning_dataflow.services.mooncake import LocalMooncake
from tests.unit.stores.samples import origin

def put(sample_id, value, num_bytes=1 << 20, attempt=0):
    tensor = torch.full((4, num_bytes // 16), value, dtype=torch.int32)
    return ref_to_json(store.put({"x": tensor}, replace(origin(sample_id), attempt=attempt)))

def get(ref):
    return store.get(ref_from_json(ref))[0]["x"].unique().tolist()

def free_all(refs):
    for ref in refs:
        store.free(ref_from_json(ref))

for line in sys.stdin:
    try:
        answer = {"value": eval(line)} if line[0] != "!" else exec(json.loads(line[1:])) or {"value": None}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


class PeerError(Exception):
    pass


class Peer:
    """Another process with its own store."""

    def __init__(self, mooncake: LocalMooncake | None = None, store_id: str = "system", **options: Any):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        if mooncake is not None:
            self.run(f"store = MooncakeFeatureStore({store_id!r}, **{places(mooncake) | options!r})")

    def __call__(self, expression: str) -> Any:
        return self._ask(expression)

    def run(self, code: str) -> None:
        self._ask("!" + json.dumps(code))

    def start(self, code: str) -> None:
        """Run `code` without waiting for it."""
        self._tell("!" + json.dumps(code))

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _ask(self, line: str) -> Any:
        self._tell(line)
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise PeerError(f"{answer['error']}: {answer['message']}")
        return answer["value"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def places(mooncake: LocalMooncake) -> dict[str, Any]:
    return {name: getattr(mooncake, name) for name in ("master_address", "client_address", "metrics_address")}


def attach(mooncake: LocalMooncake, store_id: str = "system", **options: Any) -> MooncakeFeatureStore:
    return MooncakeFeatureStore(store_id, **places(mooncake) | options)


def sample(value: int, num_bytes: int = 1 << 20) -> dict[str, torch.Tensor]:
    return {"x": torch.full((4, num_bytes // 16), value, dtype=torch.int32)}


@pytest.fixture(scope="module")
def mooncake(tmp_path_factory) -> Iterator[LocalMooncake]:
    with LocalMooncake(capacity_bytes=64 << 20, log_dir=tmp_path_factory.mktemp("mooncake")) as running:
        yield running


@pytest.fixture(scope="module")
def shared(mooncake) -> Iterator[MooncakeFeatureStore]:
    store = attach(mooncake)
    yield store
    store.close()


@pytest.fixture
def store(shared) -> Iterator[MooncakeFeatureStore]:
    yield shared
    shared.clear()


@pytest.fixture(scope="module", params=["shared_memory", "tcp"])
def peer(request, mooncake) -> Iterator[Peer]:
    peer = Peer(mooncake, **{} if request.param == "shared_memory" else {"client_address": None})
    yield peer
    peer.kill()


def test_what_one_puts_another_reads(store, peer):
    ref = peer("put('run:1', 7)")
    actual, handle = store.get(ref_from_json(ref))
    assert actual["x"].eq(7).all()
    store.release(handle)
    with pytest.raises(PeerError, match="KeyError"):
        peer(f"get({ref!r})")
    mine = store.put(sample(8), origin())
    assert peer(f"get({ref_to_json(mine)!r})") == [8]


@pytest.mark.parametrize("how", ["free", "abort", "release"])
def test_freed_is_freed_for_all_while_the_read_lease_lives(store, peer, mooncake, how):
    ref = ref_from_json(peer("put('run:1', 7)"))
    _, handle = store.get(ref)
    assert peer(f"get({ref_to_json(ref)!r})") == [7]  # both hold a lease of 10 s now
    {"free": lambda: store.free(ref), "abort": lambda: store.abort("run:1"), "release": lambda: store.release(handle)}[
        how
    ]()
    with pytest.raises(PeerError, match="KeyError"):
        peer(f"get({ref_to_json(ref)!r})")
    assert peer(f"store.exists([ref_from_json({ref_to_json(ref)!r})])") == [False]
    assert MooncakeAdmin(mooncake.metrics_address).gauge("master_allocated_bytes") == 0


def test_attempts_order_across_processes(store, peer):
    old = ref_from_json(peer("put('run:1', 0)"))
    new = store.put(sample(1), replace(origin(), attempt=1))
    with pytest.raises(PeerError, match="KeyError"):
        peer(f"get({ref_to_json(old)!r})")
    late = ref_from_json(peer("put('run:1', 2)"))
    with pytest.raises(KeyError):
        store.get(late)
    assert store.exists([old, new, late]) == [False, True, False]
    assert store.health()["num_samples"] == 1


def test_room_that_another_process_makes_is_there_at_once(store, peer):
    refs = []
    with pytest.raises(CapacityError, match=r"needs 8388608 bytes, \d+ of 67108864 are taken"):
        for index in range(9):
            refs.append(store.put(sample(index, 8 << 20), origin(f"run:{index}")))
    before = store.health()["num_samples"]
    assert before == len(refs) >= 6
    peer(f"free_all({[ref_to_json(ref) for ref in refs]!r})")
    assert store.health()["num_samples"] == store.health()["num_bytes"] == 0
    store.put(sample(1, 8 << 20), origin())


CHURN = """
for index in range({rounds}):
    ref = put(f"run:{{index % 3}}", index, 8 << 20)
    print(json.dumps(ref), flush=True)
    time.sleep(0.004 * (index % 4))
    store.free(ref_from_json(ref))
print("done", flush=True)
"""


def follow(peer: Peer) -> "queue.SimpleQueue[str]":
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert peer.process.stdout is not None
        for line in peer.process.stdout:
            lines.put(line.strip())

    threading.Thread(target=read, daemon=True).start()
    return lines


def read_newest(store: MooncakeFeatureStore, lines: "queue.SimpleQueue[str]") -> tuple[int, int]:
    """Read announced samples until `done`. Returns (verified, gone); mixed bytes fail."""
    verified = gone = 0
    newest = ""
    while newest != "done":
        newest = lines.get(timeout=30)
        while not lines.empty() and newest != "done":
            newest = lines.get()
        if newest == "done":
            break
        ref = ref_from_json(json.loads(newest))
        for _ in range(3):
            try:
                actual, _ = store.get(ref)
            except KeyError:
                gone += 1
                break
            first = int(actual["x"][0, 0])
            assert actual["x"].eq(first).all(), "bytes of two samples in one"
            verified += 1
    return verified, gone


@pytest.mark.parametrize(("client", "rounds"), [("shared_memory", 100), pytest.param("tcp", 400, marks=pytest.mark.slow)])
def test_a_read_in_flight_never_returns_mixed_bytes(tmp_path, client, rounds):
    """The writer frees by force and puts into the same space while we read: room for two samples only.

    Slow reads over TCP are what catches a store that does not look again after its bytes have landed.
    """
    with LocalMooncake(capacity_bytes=20 << 20, log_dir=tmp_path) as small:
        reader = attach(small, **{} if client == "shared_memory" else {"client_address": None})
        writer = Peer(small)
        writer.start(CHURN.format(rounds=rounds))
        verified, gone = read_newest(reader, follow(writer))
        writer.kill()
        reader.close()
    assert verified > 5
    assert gone > 5


def test_a_producer_killed_after_its_put(store, mooncake):
    for options in ({}, {"client_address": None}):
        producer = Peer(mooncake, **options)
        ref = ref_from_json(producer("put('run:1', 7, 8 << 20)"))
        producer.kill()
        assert store.get(ref)[0]["x"].eq(7).all()


@pytest.mark.slow
def test_a_producer_killed_in_the_middle_of_puts(store, mooncake):
    """Announced samples are complete, the rest is swept, and all space is free again."""
    code = "for index in range(1000):\n    print(json.dumps(put(f'run:{index % 4}', index, 4 << 20)), flush=True)"
    announced: dict[str, SampleRef] = {}
    for options, delay in (({}, 0.13), ({"client_address": None}, 0.21), ({"client_address": None}, 0.17)):
        producer = Peer(mooncake, **options)
        lines = follow(producer)
        producer.start(code)
        ref = ref_from_json(json.loads(lines.get(timeout=30)))
        time.sleep(delay)
        producer.kill()
        time.sleep(0.2)
        while not lines.empty():
            ref = ref_from_json(json.loads(lines.get()))
        announced[ref.sample_id] = ref
        if store.exists([ref])[0]:  # else its successor was being put
            actual = store.get(ref)[0]["x"]
            assert actual.eq(int(actual[0, 0])).all()
    live = {(ref.sample_id, ref.generation) for ref in announced.values()}
    store.sweep(lambda *generation: generation in live)
    assert store.health()["num_samples"] <= len(live)
    for ref in announced.values():
        store.free(ref)
    deadline = time.monotonic() + 40
    while store.health()["num_bytes"]:
        assert time.monotonic() < deadline, "half-written objects keep their space"
        time.sleep(0.2)
        store.put(sample(1), origin("run:other"))  # the master gives space back when somebody needs it
        store.abort("run:other")


def timed(action) -> tuple[Exception, float]:
    """The error of `action`, one line, and the seconds until it came."""
    began = time.monotonic()
    with pytest.raises((StoreUnavailableError, KeyError, CapacityError)) as caught:
        action()
    assert "\n" not in str(caught.value)
    print(f"{time.monotonic() - began:.1f} s: {type(caught.value).__name__}: {caught.value}")
    return caught.value, time.monotonic() - began


def until_it_works(action, limit_s: float) -> float:
    began = time.monotonic()
    while True:
        try:
            action()
            return time.monotonic() - began
        except (StoreUnavailableError, CapacityError):
            assert time.monotonic() - began < limit_s


@pytest.mark.slow
@pytest.mark.parametrize("client", ["shared_memory", nightly("tcp")])
def test_the_master_dies_and_comes_back(tmp_path, client):
    with LocalMooncake(capacity_bytes=32 << 20, log_dir=tmp_path) as mooncake:
        options = {} if client == "shared_memory" else {"client_address": None}
        store = attach(mooncake, unavailable_timeout_s=2, **options)
        ref = store.put(sample(1), origin())
        mooncake.master.process.kill()
        for action in (lambda: store.get(ref), lambda: store.put(sample(2), origin("run:2"))):
            error, seconds = timed(action)
            assert isinstance(error, StoreUnavailableError)
            assert f"Mooncake master {mooncake.master_address}" in str(error)
            assert seconds < 2 + 10  # the timeout, and calls of 4.3 s in the library
        error, _ = timed(store.health)
        assert f"metrics port {mooncake.metrics_address}" in str(error)
        mooncake.master.start()
        seconds = until_it_works(lambda: store.put(sample(3), origin("run:3")), 15)
        print(f"put works {seconds:.1f} s after the restart")
        assert isinstance(timed(lambda: store.get(ref))[0], KeyError)
        store.close()


def test_who_stops_waiting_is_told_at_once(tmp_path):
    with LocalMooncake(capacity_bytes=32 << 20, log_dir=tmp_path) as mooncake:
        store = attach(mooncake, unavailable_timeout_s=60)
        ref = store.put(sample(1), origin())
        mooncake.master.process.kill()
        with ThreadPoolExecutor(1) as pool:
            began, waiting = time.monotonic(), pool.submit(timed, lambda: store.get(ref))
            time.sleep(1.0)
            store.stop_waiting()
            assert isinstance(waiting.result()[0], StoreUnavailableError)
        assert time.monotonic() - began < 12  # calls of 4.3 s in the library
        store.close()


def test_a_wait_bridges_a_restart_of_the_master(tmp_path):
    with LocalMooncake(capacity_bytes=32 << 20, log_dir=tmp_path) as mooncake:
        store = attach(mooncake)
        mooncake.master.process.kill()
        with ThreadPoolExecutor(1) as pool:
            ref = pool.submit(store.put, sample(3), origin())
            time.sleep(1.0)
            mooncake.master.start()
            store.get(ref.result(timeout=20))
        store.close()


@pytest.mark.slow
def test_the_storage_process_dies_and_comes_back(tmp_path):
    with LocalMooncake(capacity_bytes=32 << 20, log_dir=tmp_path) as mooncake:
        near = attach(mooncake, unavailable_timeout_s=2)
        far = attach(mooncake, client_address=None)
        ref = far.put(sample(1), origin())
        mooncake.storage.process.kill()
        error, _ = timed(lambda: far.get(ref))
        assert isinstance(error, KeyError)
        error, seconds = timed(lambda: near.get(ref))
        assert isinstance(error, StoreUnavailableError)
        assert f"mooncake_client {mooncake.client_address}" in str(error)
        assert seconds < 2 + 10
        error, _ = timed(lambda: far.put(sample(2), origin("run:2")))
        assert "the storage process behind Mooncake master" in str(error)
        time.sleep(CLIENT_PAUSE_S)
        mooncake.storage.start()
        for store in (near, far):
            seconds = until_it_works(lambda store=store: store.put(sample(3), origin("run:3")), 20)
            print(f"put works {seconds:.1f} s after the restart")
            assert isinstance(timed(lambda store=store: store.get(ref))[0], KeyError)
            store.close()


@pytest.mark.nightly
def test_a_storage_process_that_comes_back_unnoticed_gets_new_memory(tmp_path):
    with LocalMooncake(capacity_bytes=32 << 20, log_dir=tmp_path) as mooncake:
        writer, reader = attach(mooncake), attach(mooncake)
        for store in (writer, reader):
            store.put(sample(1), origin())  # now each has memory that the next mooncake_client will not know
        mooncake.storage.process.kill()
        mooncake.storage.process.wait()
        mooncake.storage.start()
        fresh = attach(mooncake)
        readable = fresh.put(sample(2), origin("run:2"))
        assert torch.equal(reader.get(readable)[0]["x"], sample(2)["x"])
        assert torch.equal(fresh.get(writer.put(sample(1), origin("run:3")))[0]["x"], sample(1)["x"])
        for store in (writer, reader, fresh):
            store.close()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"client_address": None}], ids=["shared_memory", "tcp"])
def test_a_process_that_stood_still_goes_on(tmp_path, options):
    """Longer than the 10 s after which Mooncake forgets it."""
    with LocalMooncake(capacity_bytes=64 << 20, log_dir=tmp_path) as mooncake:
        store, peer = attach(mooncake), Peer(mooncake, **options)
        peer(f"get({ref_to_json(store.put(sample(1), origin('run:1')))})")
        peer.run("kept = store.get(ref_from_json(put('run:0', 7)))[0]['x']")
        peer.process.send_signal(signal.SIGSTOP)
        ref = store.put(sample(2), origin("run:2"))
        time.sleep(STOOD_STILL_S)
        peer.process.send_signal(signal.SIGCONT)
        assert peer(f"get({ref_to_json(ref)})") == [2]
        put = ref_from_json(peer("put('run:3', 3)"))
        assert (store.get(put)[0]["x"] == 3).all()
        assert peer("kept.unique().tolist()") == [7]
        peer.kill()
        store.close()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["master", nightly("storage")])
def test_a_mooncake_that_stood_still_goes_on(tmp_path, part):
    """What the storage process held may be lost, and is captured again."""
    with LocalMooncake(capacity_bytes=64 << 20, log_dir=tmp_path) as mooncake:
        near, far = attach(mooncake), attach(mooncake, client_address=None)
        ref = near.put(sample(1), origin("run:1"))
        stopped = getattr(mooncake, part).process
        stopped.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(store.get_many, [ref]) for store in (near, far)]
            time.sleep(STOOD_STILL_S)
            stopped.send_signal(signal.SIGCONT)
            for future in found:
                (result,) = future.result(timeout=90)
                assert isinstance(result, KeyError) or torch.equal(result[0]["x"], sample(1)["x"])
        for number, store in enumerate((near, far), start=2):
            store.put(sample(number), origin(f"run:{number}"))
            store.close()


def processes_with(text: str) -> list[int]:
    actual = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text in (folder / "cmdline").read_text():
                actual.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return actual


def test_nothing_is_left_behind(tmp_path):
    before = set(os.listdir("/dev/shm"))
    with LocalMooncake(capacity_bytes=32 << 20, log_dir=tmp_path) as mooncake:
        store = attach(mooncake)
        store.get(store.put(sample(1), origin()))
        assert len(processes_with(mooncake.master_address.split(":")[1])) >= 2
        store.close()
    assert not processes_with(mooncake.master_address.split(":")[1])
    assert set(os.listdir("/dev/shm")) <= before


def test_a_killed_parent_takes_its_mooncake_along(tmp_path):
    parent = Peer()
    parent.run(f"mooncake = LocalMooncake(capacity_bytes=32 << 20, log_dir={str(tmp_path)!r})")
    pids = parent("[server.process.pid for server in mooncake.servers]")
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    parent.process.send_signal(signal.SIGKILL)
    parent.process.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
