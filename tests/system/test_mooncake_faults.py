"""A Mooncake that dies, stands still or ends: it is noticed, work goes on, and nothing is left behind."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_dataflow.contracts import CapacityError, ref_from_json, ref_to_json
from lightning_dataflow.services.mooncake import CLIENT_PAUSE_S, LocalMooncake
from lightning_dataflow.stores import StoreUnavailableError
from tests.processes import nightly
from tests.system.mooncake_peers import Peer, attach, sample
from tests.unit.stores.samples import origin

STOOD_STILL_S = 16.0


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


@pytest.mark.nightly
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
@pytest.mark.parametrize("options", [{}, nightly({"client_address": None})], ids=["shared_memory", "tcp"])
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
