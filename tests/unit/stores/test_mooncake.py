"""What only the Mooncake store does."""

import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lightning_dataflow.config.parsing import parse_config
from lightning_dataflow.contracts import CapacityError, UserError
from lightning_dataflow.run.streams import control_plane, shared_store
from lightning_dataflow.stores import MooncakeFeatureStore, StoreUnavailableError
from lightning_dataflow.stores.mooncake import client
from lightning_dataflow.stores.mooncake.admin import MooncakeAdmin
from lightning_dataflow.stores.mooncake.client import NOT_FOUND, PUT_TRIES
from tests.unit.config.test_config import make
from tests.unit.stores.conftest import VARIANTS, attach
from tests.unit.stores.samples import origin, tensors

pytestmark = pytest.mark.integration  # each test starts or stops clients of a real Mooncake


@pytest.fixture(params=VARIANTS)
def store(request, mooncake_stores) -> Iterator[MooncakeFeatureStore]:
    store = mooncake_stores(request.param)
    yield store
    store.clear()


@pytest.fixture
def keys(mooncake, store):
    """The keys of this store now."""
    return lambda: sorted(key for key in MooncakeAdmin(mooncake.metrics_address).list_keys() if store.store_id in key)


@pytest.mark.parametrize("times", [PUT_TRIES - 1, PUT_TRIES])
def test_a_put_that_the_master_discarded_is_tried_again(store, monkeypatch, times):
    """As after a cut link: the call took longer than the master keeps what is half written."""
    left, put = [True] * times, store._client.put

    def cut(*arguments):
        codes = put(*arguments)
        return [NOT_FOUND for _ in codes] if left and left.pop() else codes

    monkeypatch.setattr(store._client, "put", cut)
    if times == PUT_TRIES:
        with pytest.raises(StoreUnavailableError, match="discarded a put 3 times"):
            store.put(tensors(), origin("a"))
        return
    ref = store.put(tensors(), origin("a"))
    found, _ = store.get(ref)
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


def lying(ref, **shape):
    features = {name: replace(spec, shape=shape.get(name, spec.shape)) for name, spec in ref.features.items()}
    return replace(ref, features=features)


@pytest.mark.parametrize("rows", [2, 8])
def test_a_ref_that_lies_about_a_size_reads_nothing(store, rows):
    ref = store.put(tensors(), origin())
    with pytest.raises(KeyError):
        store.get(lying(ref, a=(rows, 8)))
    assert store.get(ref)[0]["a"].shape == (4, 8)


def test_a_ref_with_a_feature_too_many_reads_nothing(store):
    ref = store.put(tensors(), origin())
    with pytest.raises(KeyError):
        store.get(replace(ref, features={**ref.features, "c": replace(ref.features["a"], name="c")}))


def test_a_tensor_without_elements(store):
    ref = store.put({"a": torch.ones(3), "none": torch.zeros(0, 5, dtype=torch.float16)}, origin())
    found, handle = store.get(ref)
    assert found["none"].shape == (0, 5)
    assert found["none"].dtype == torch.float16
    assert store.exists([ref]) == [True]
    store.release(handle)
    assert store.exists([ref]) == [False]


def test_nothing_but_empty_tensors(store):
    with pytest.raises(ValueError, match="run:1 has only empty tensors"):
        store.put({"a": torch.zeros(0)}, origin())


def test_retained_samples_stay(mooncake):
    store = attach(mooncake, "retained", retain=True)
    ref = store.put(tensors(), origin())
    for _ in range(3):
        store.release(store.get(ref)[1])
    store.free(ref)
    assert store.exists([ref]) == [False]
    store.close()


def test_a_ref_of_another_store(store):
    """Stands in its place among those that are read together."""
    mine = store.put(tensors(), origin())
    theirs = replace(mine, uri="mooncake://other")
    found = store.get_many([theirs, mine, theirs])
    assert [isinstance(one, KeyError) for one in found] == [True, False, True]
    assert "is in mooncake://other, this store is mooncake://" in str(found[0])


def test_runs_of_one_name_do_not_share_a_store(mooncake, tmp_path):
    """The one that ends first leaves the other its features; a run that is resumed finds its own again."""
    places = ("master_address", "client_address", "metrics_address")
    where = [f"store.{name.replace('master_', '')}={getattr(mooncake, name)}" for name in places]

    def attach_run(control: str) -> MooncakeFeatureStore:
        config = parse_config(make("topology=disagg_online", "run_name=mine", f"channel.path={tmp_path / control}", *where))
        with closing(control_plane(config)) as plane:
            return shared_store(config, plane)

    one, other, resumed = attach_run("one"), attach_run("other"), attach_run("one")
    ref = one.put(tensors(), origin())
    other.put(tensors(), origin())
    assert other.exists([ref]) == [False]
    with pytest.raises(KeyError, match=rf"is in {one.uri}, this store is {other.uri}"):
        other.get(ref)
    other.sweep(lambda sample_id, generation: False)
    other.clear()
    assert resumed.exists([ref]) == [True]
    resumed.clear()
    for store in (one, other, resumed):
        store.close()


def test_ids_are_taken_literally(store):
    ids = ["a.b", "aXb", "a.b#1", "a.b:1", "a.b-1", "a.b_1", "a", "ab"]
    refs = {sample_id: store.put(tensors(), origin(sample_id)) for sample_id in ids}
    for sample_id in ids:
        store.abort(sample_id)
        del refs[sample_id]
        assert store.exists(list(refs.values())) == [True] * len(refs)


@pytest.mark.parametrize("sample_id", ["../escape", "a/b", "", "a|b", "a*"])
def test_an_id_cannot_be_a_pattern_or_another_sample(store, sample_id):
    for call in (lambda: store.put(tensors(), origin(sample_id)), lambda: store.abort(sample_id)):
        with pytest.raises(UserError, match="not a valid id"):
            call()


def test_attempts_order_however_they_come(store, keys):
    attempts = [2, 0, 10, 9, 11, 3]
    refs = {attempt: store.put(tensors(attempt), replace(origin(), attempt=attempt)) for attempt in attempts}
    assert [attempt for attempt, found in zip(refs, store.exists(list(refs.values())), strict=True) if found] == [11]
    assert store.get(refs[11])[0]["a"].eq(11).all()
    for attempt in (2, 10):
        store.free(refs[attempt])  # stale: the marks must stay
    late = store.put(tensors(), replace(origin(), attempt=5))
    assert store.exists([late]) == [False]
    store.free(refs[11])
    assert keys() == []


def test_freeing_a_superseded_generation_of_the_same_attempt(store):
    old, new = (store.put(tensors(value), replace(origin(), attempt=1)) for value in range(2))
    store.free(old)
    late = store.put(tensors(), origin())
    assert store.exists([old, new, late]) == [False, True, False]


def test_a_tensor_larger_than_the_plain_calls_move(mooncake, monkeypatch):
    monkeypatch.setattr(client, "STAGING_BYTES", 16 << 20)
    store = attach(mooncake, "small-staging", zero_copy=False)
    with pytest.raises(UserError, match=r"20971520 bytes, .* at most 16777216: set store\.zero_copy=true"):
        store.put({"a": torch.zeros(20 << 20, dtype=torch.uint8)}, origin())
    store.close()


def test_a_mooncake_without_the_raw_calls(mooncake, mooncake_stores, monkeypatch, caplog):
    """The store falls back to the plain calls by itself, and reads and writes what others do."""

    class Plain:
        def __init__(self):
            self._store = real.MooncakeDistributedStore()

    real = client.import_mooncake()
    missing = ("batch_put_from", "batch_get_into", "register_buffer")
    calls = {name for name in dir(real.MooncakeDistributedStore) if not name.startswith("_")} - set(missing)
    for name in calls:
        setattr(Plain, name, lambda self, *arguments, name=name: getattr(self._store, name)(*arguments))
    plain_mooncake = SimpleNamespace(MooncakeDistributedStore=Plain, ReplicateConfig=real.ReplicateConfig)
    monkeypatch.setattr(client, "import_mooncake", lambda: plain_mooncake)
    raw = mooncake_stores("mooncake")
    plain = attach(mooncake, raw.store_id)
    assert "has no batch_put_from" in caplog.text
    for writer, reader in ((raw, plain), (plain, raw)):
        ref = writer.put(tensors(), replace(origin(), attempt=1))
        found, handle = reader.get(ref)
        assert all(torch.equal(found[name], value) for name, value in tensors().items())
        reader.release(handle)
        assert writer.exists([ref]) == [False]
    plain.close()


def test_a_put_again_leaves_one_generation(store, keys):
    refs = [store.put({"a": torch.full((3,), value)}, origin()) for value in range(3)]
    assert store.exists(refs) == [False, False, True]
    assert len(keys()) == 1


def test_sweep_takes_the_marks_of_what_is_gone(store, keys):
    live, orphan = (store.put(tensors(), replace(origin(f"run:{index}"), attempt=2)) for index in range(2))
    assert store.sweep(lambda sample_id, generation: generation == live.generation) == {"orphans": 1}
    assert {key.split("/")[1] for key in keys()} == {live.sample_id}
    assert len([key for key in keys() if "superseded" in key]) == 2
    assert store.exists([orphan]) == [False]
    assert store.sweep() == {}


def test_without_the_masters_metrics_orphans_stay_until_the_end(mooncake):
    store = attach(mooncake, "blind", metrics_address=None)
    ref = store.put(tensors(), origin())
    assert store.health() == {"num_samples": 1, "num_bytes": ref.num_bytes, "capacity_bytes": 0}
    assert store.sweep(lambda sample_id, generation: False) == {}
    assert store.exists([ref]) == [True]
    store.clear()
    assert store.health()["num_samples"] == 0
    store.close()


def test_a_sample_larger_than_the_store(store, mooncake):
    with pytest.raises(CapacityError, match="too small for one sample"):
        store.put({"a": torch.zeros(mooncake.capacity_bytes + 1, dtype=torch.uint8)}, origin())


def test_steady_state_allocates_no_buffers(mooncake, monkeypatch):
    store = attach(mooncake, "steady")
    sample = {"a": torch.zeros(1 << 20)}
    allocate, allocated = store._client.pool._allocate, []
    monkeypatch.setattr(store._client.pool, "_allocate", lambda size: allocated.append(size) or allocate(size))
    for index in range(20):
        store.release(store.get(store.put(sample, origin(f"run:{index}")))[1])
    assert len(allocated) <= 2
    store.close()


def test_a_buffer_that_cannot_be_had(mooncake, monkeypatch):
    store, freed = attach(mooncake, "refused", unavailable_timeout_s=0.1), []
    allocator = SimpleNamespace(alloc=lambda num_bytes: 4096, free=freed.append)
    monkeypatch.setattr(store._client, "_shared_memory", allocator)
    monkeypatch.setattr(store._client, "_store", SimpleNamespace(register_buffer=lambda address, num_bytes: -1))
    with pytest.raises(StoreUnavailableError, match="did not answer"):
        store.put(tensors(), origin())
    assert set(freed) == {4096}, "what cannot be registered is freed"
    allocator.alloc = lambda num_bytes: 0
    with pytest.raises(MemoryError, match="transfer buffer of 65536 bytes"):
        store.put(tensors(), origin())
    monkeypatch.undo()
    store.close()


def test_tensors_outlive_the_store(mooncake):
    store = attach(mooncake, "short-lived")
    found, handle = store.get(store.put(tensors(5.0), origin()))
    store.release(handle)
    store.close()
    assert found["a"].eq(5).all()
    del found


def test_nobody_at_an_address(mooncake):
    with socket.create_server(("127.0.0.1", 0)) as server:
        absent = f"127.0.0.1:{server.getsockname()[1]}"
    for places, message in (
        ({"master_address": absent}, f"no Mooncake master listens at {absent}"),
        ({"client_address": absent}, f"no mooncake_client listens at {absent}"),
        ({"master_address": "nonsense"}, "'nonsense', expected host:port"),
    ):
        began = time.monotonic()
        with pytest.raises(UserError, match=message) as caught:
            attach(mooncake, "s", **places)
        assert time.monotonic() - began < 3
        assert "\n" not in str(caught.value)


def test_without_the_package():
    code = """
import sys
sys.modules["mooncake"] = None
from lightning_dataflow.stores import MooncakeFeatureStore
try:
    MooncakeFeatureStore("s", master_address="127.0.0.1:1")
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'lightning-dataflow[mooncake]'" in result.stdout
    assert "libibverbs1" in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("columns", [1 << 29, 1 << 33])
def test_a_ref_that_claims_more_than_is_stored_takes_no_memory(store, columns):
    """8 GiB, or 128 GiB, of a sample of a few bytes; others that are read with it come."""
    small, other = store.put(tensors(), origin("a")), store.put(tensors(), origin("b"))
    name = next(iter(small.features))
    shape = (small.num_tokens, columns)
    features = {**small.features, name: replace(small.features[name], shape=shape, dtype="float32")}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, right = store.get_many([replace(small, features=features, num_bytes=columns * small.num_tokens * 4), other])
    assert isinstance(wrong, KeyError)
    assert f"{name} has " in str(wrong)
    assert torch.equal(right[0][name], tensors()[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    store.release(right[1])
