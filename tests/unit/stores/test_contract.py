"""One contract, every store."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from lightning_dataflow.contracts import CapacityError, FeatureHandle
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.stores import FeatureStore, MemoryFeatureStore, SharedDirFeatureStore
from tests.unit.stores.conftest import VARIANTS, attach
from tests.unit.stores.samples import origin, tensors

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.fixture(params=["memory", "shared_dir", *VARIANTS])
def backend(request) -> str:
    return request.param


@pytest.fixture
def store(backend, request, tmp_path) -> Iterator[FeatureStore]:
    if backend == "memory":
        yield MemoryFeatureStore()
    elif backend == "shared_dir":
        yield SharedDirFeatureStore(tmp_path / "store")
    else:
        store = request.getfixturevalue("mooncake_stores")(backend)
        yield store
        store.clear()


@pytest.fixture
def small_store(backend, tmp_path) -> Iterator[tuple[FeatureStore, int]]:
    """A store with room for 2000 units, and the bytes of one unit. Mooncake really is that small."""
    if backend == "memory":
        yield MemoryFeatureStore(capacity_bytes=2000), 1
    elif backend == "shared_dir":
        yield SharedDirFeatureStore(tmp_path / "store", capacity_bytes=2000), 1
    else:
        with LocalMooncake(capacity_bytes=16 << 20, log_dir=tmp_path) as mooncake:
            store = attach(mooncake, "small", **VARIANTS[backend])
            yield store, mooncake.capacity_bytes // 2000
            store.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_is_bit_exact(store, dtype):
    raw = torch.randint(0, 2 if dtype == torch.bool else 120, (3, 16), dtype=torch.uint8)
    tensor = raw.bool() if dtype == torch.bool else raw.view(dtype)
    ref = store.put({"x": tensor}, origin())
    found, _ = store.get(ref)
    assert found["x"].dtype == dtype
    assert torch.equal(found["x"].view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert ref.num_bytes == tensor.numel() * tensor.element_size()
    assert ref.features["x"].shape == tuple(tensor.shape)


def test_what_is_stored_is_a_copy(store):
    mine = tensors()
    ref = store.put(mine, origin())
    mine["a"].zero_()
    assert store.get(ref)[0]["a"].eq(1).all()


def test_a_non_contiguous_tensor(store):
    ref = store.put({"x": torch.arange(12).view(3, 4).T}, origin())
    assert torch.equal(store.get(ref)[0]["x"], torch.arange(12).view(3, 4).T)


def test_consumed_once(store):
    ref = store.put(tensors(), origin())
    _, handle = store.get(ref)
    store.release(handle)
    with pytest.raises(KeyError, match="run:1"):
        store.get(ref)
    assert store.health()["num_samples"] == store.health()["num_bytes"] == 0
    store.release(handle)  # again: nothing


def test_a_put_supersedes(store):
    old = store.put(tensors(1.0), origin())
    _, stale = store.get(old)
    new = store.put(tensors(2.0), replace(origin(), attempt=1))
    assert new.generation.startswith("1-")
    assert new.generation != old.generation
    with pytest.raises(KeyError):
        store.get(old)
    store.release(stale)  # must not free the new generation
    assert store.get(new)[0]["a"].eq(2).all()
    assert store.health()["num_samples"] == 1


def test_a_late_older_attempt_is_stale_at_once(store):
    new = store.put(tensors(2.0), replace(origin(), attempt=1))
    late = store.put(tensors(1.0), origin())
    with pytest.raises(KeyError):
        store.get(late)
    assert store.get(new)[0]["a"].eq(2).all()
    assert store.health()["num_samples"] == 1


def test_abort_frees_every_generation(store):
    ref = store.put(tensors(), origin())
    store.abort("run:1")
    store.abort("run:never-there")
    with pytest.raises(KeyError):
        store.get(ref)
    assert store.health()["num_samples"] == 0


def test_free_takes_one_generation_only(store):
    old = store.put(tensors(1.0), origin())
    new = store.put(tensors(2.0), replace(origin(), attempt=1))
    store.free(old)
    assert store.exists([old, new]) == [False, True]
    assert store.get(new)[0]["a"].eq(2).all()
    store.free(new)
    store.free(new)
    assert store.exists([new]) == [False]
    with pytest.raises(KeyError):
        store.get(new)
    assert store.health()["num_samples"] == 0


def test_many_at_once(store):
    """A sample that is gone takes none of the others along."""
    refs = [store.put(tensors(float(index)), origin(f"run:{index}")) for index in range(4)]
    store.free(refs[1])
    store.put(tensors(9.0), replace(origin("run:2"), attempt=1))
    found = store.get_many(refs)
    assert [isinstance(one, KeyError) for one in found] == [False, True, True, False]
    for index in (0, 3):
        assert found[index][0]["a"].eq(index).all()
    store.release_many([one[1] for one in found if not isinstance(one, KeyError)])
    assert store.exists(refs) == [False] * 4
    assert store.health()["num_samples"] == 1
    assert store.get_many([]) == []
    store.release_many([])


def test_a_sample_that_is_asked_for_twice_at_once(store):
    """A window across two passes may hold it twice. Mooncake filled one of two buffers alone."""
    refs = [store.put(tensors(float(index)), origin(f"run:{index}")) for index in range(3)]
    wanted = (0, 1, 0, 2, 1)
    for (found, _), value in zip(store.get_many([refs[index] for index in wanted]), wanted, strict=True):
        assert found["a"].eq(value).all()


def test_a_ref_names_the_instance_that_holds_it(store):
    """What is here by chance under the same id and generation is of another store, and is neither read nor freed."""
    mine = store.put(tensors(), origin())
    theirs = replace(mine, uri="elsewhere://1")
    with pytest.raises(KeyError, match=rf"generation {mine.generation} is in elsewhere://1, this store is {store.uri}"):
        store.get(theirs)
    assert [isinstance(one, KeyError) for one in store.get_many([theirs, mine])] == [True, False]
    assert store.exists([theirs, mine]) == [False, True]
    store.free(theirs)
    assert store.exists([mine]) == [True]


def test_tensors_outlive_their_release(store):
    ref = store.put(tensors(3.0), origin())
    found, handle = store.get(ref)
    store.release(handle)
    for index in range(4):  # whatever memory the first read used must not be used again
        other = store.put(tensors(float(index)), origin(f"run:{index + 2}"))
        store.release(store.get(other)[1])
    assert found["a"].eq(3).all()


def test_sweep_removes_what_nobody_holds(store):
    live, orphan = (store.put(tensors(), origin(f"run:{index}")) for index in range(2))
    held = {(live.sample_id, live.generation)}
    assert store.sweep(lambda sample_id, generation: (sample_id, generation) in held)["orphans"] == 1
    assert store.exists([live, orphan]) == [True, False]


def test_an_empty_put(store):
    with pytest.raises(ValueError, match="without tensors"):
        store.put({}, origin())


@pytest.mark.integration
def test_over_capacity_nothing_is_visible(small_store):
    store, unit = small_store

    def sample(units: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(units * unit, dtype=torch.uint8)}

    first = store.put(sample(1000), origin("run:1"))
    with pytest.raises(CapacityError, match=f"run:2 needs {1500 * unit} bytes"):
        store.put({"fits": sample(500)["x"], **sample(1000)}, origin("run:2"))
    assert store.health()["num_samples"] == 1
    replaced = store.put(sample(1500), origin("run:1"))  # its own space counts as free
    with pytest.raises(KeyError):
        store.get(first)
    _, handle = store.get(replaced)
    store.release(handle)
    store.put(sample(1500), origin("run:2"))


@pytest.mark.integration
def test_many_threads(store):
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for index in range(20):
                ref = store.put({"x": torch.full((64,), worker * 100 + index)}, origin(f"run:{worker}-{index}"))
                found, handle = store.get(ref)
                assert found["x"].eq(worker * 100 + index).all()
                store.release(handle)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert store.health()["num_samples"] == 0


def test_the_last_release_frees(store):
    ref = store.put(tensors(), origin())
    handles = [store.get(ref)[1] for _ in range(2)]
    store.release(handles[0])
    store.release(handles[0])  # the same lease twice is one release
    assert store.exists([ref]) == [True]
    store.release(handles[1])
    assert store.exists([ref]) == [False]


def test_a_release_needs_the_token_of_a_lease(store):
    ref = store.put(tensors(), origin())
    _, handle = store.get(ref)
    store.release(replace(handle, lease_token="0" * 16))
    store.release(FeatureHandle(sample_id="run:9", generation=ref.generation, lease_token=handle.lease_token))
    assert store.exists([ref]) == [True]
    store.release(handle)
    assert store.exists([ref]) == [False]
