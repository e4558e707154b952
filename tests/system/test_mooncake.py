"""Mooncake between processes: what one puts all can read, what one frees is gone for all, also when one is killed."""

import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lightning_dataflow.contracts import CapacityError, SampleRef, ref_from_json, ref_to_json
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.stores import MooncakeFeatureStore
from lightning_dataflow.stores.mooncake.admin import MooncakeAdmin
from tests.system.mooncake_peers import Peer, PeerError, attach, sample
from tests.unit.stores.samples import origin


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
