"""What only the shared folder does."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_dataflow.contracts import CapacityError, UserError, ref_to_json
from lightning_dataflow.stores import SharedDirFeatureStore, StoreUnavailableError, shared_dir
from tests.unit.stores.samples import origin, tensors


def _bytes(value: float) -> bytes:
    return torch.full((4, 8), value).numpy().tobytes()


def test_retained_files_stay(tmp_path):
    store = SharedDirFeatureStore(tmp_path, retain=True)
    ref = store.put(tensors(), origin())
    for _ in range(3):
        _, handle = store.get(ref)
        store.release(handle)
    assert store.health()["num_samples"] == 1


@pytest.mark.integration
def test_another_process_reads_frees_and_is_told(tmp_path):
    store = SharedDirFeatureStore(tmp_path)
    refs = [store.put(tensors(index), origin(f"run:{index}")) for index in range(2)]
    code = f"""
import sys
from tests.unit.stores.samples import origin
from lightning_dataflow.stores import SharedDirFeatureStore
from lightning_dataflow.contracts import ref_from_json
store = SharedDirFeatureStore({str(tmp_path)!r})
store.release(store.get(ref_from_json({ref_to_json(refs[0])!r}))[1])
store.abort("run:1")
store.put({{"a": __import__("torch").ones(2)}}, origin("run:2"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for ref in refs:
        with pytest.raises(KeyError):
            store.get(ref)
    assert store.health()["num_samples"] == 1


def test_a_short_file_is_a_key_error(tmp_path):
    store = SharedDirFeatureStore(tmp_path)
    ref = store.put(tensors(), origin())
    file = next(tmp_path.rglob(f"{ref.generation}.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(KeyError, match="cannot be read"):
        store.get(ref)


def test_other_tensors_than_the_ref_says(tmp_path):
    store = SharedDirFeatureStore(tmp_path)
    ref = store.put(tensors(), origin())
    lying = replace(ref, features={"a": ref.features["a"]})
    with pytest.raises(KeyError, match="the ref says"):
        store.get(lying)


@pytest.mark.parametrize("sample_id", ["../escape", "/etc/passwd", "a/b", ""])
def test_an_id_cannot_leave_the_folder(tmp_path, sample_id):
    store = SharedDirFeatureStore(tmp_path)
    with pytest.raises(UserError, match="not a valid id"):
        store.put(tensors(), origin(sample_id))
    with pytest.raises(UserError, match="not a valid id"):
        store.free(replace(store.put(tensors(), origin()), generation=sample_id))


def test_the_secret(tmp_path):
    store = SharedDirFeatureStore(tmp_path, secret="one")
    ref = store.put(tensors(), origin())
    for wrong in ("two", None):
        with pytest.raises(PermissionError, match="does not match"):
            SharedDirFeatureStore(tmp_path, secret=wrong)
    assert SharedDirFeatureStore(tmp_path, secret="one").get(ref)
    assert "one" not in (tmp_path / "store.json").read_text()


def test_a_file_that_was_put_without_the_secret_is_refused(tmp_path):
    """A file that somebody else puts there, changes, or moves to another sample."""
    store = SharedDirFeatureStore(tmp_path, secret="one")
    ref, other = store.put(tensors(), origin()), store.put(tensors(2.0), origin("run:2"))
    path, another = (tmp_path / "samples" / one.sample_id / f"{one.generation}.safetensors" for one in (ref, other))
    signed = path.read_bytes()
    save_file(tensors(), path)
    for file in (path.read_bytes(), another.read_bytes(), signed.replace(*map(_bytes, (1.0, 3.0)))):
        path.write_bytes(file)
        with pytest.raises(PermissionError, match=r"run:1 .* was not written with this store's secret"):
            store.get(ref)
    path.write_bytes(signed)
    assert store.get(ref)[0]["a"].eq(1).all()


def test_a_damaged_file_is_a_lost_one(tmp_path):
    """One flipped bit of one tensor, or the file of another sample, was read as features."""
    store = SharedDirFeatureStore(tmp_path)
    ref, other = store.put(tensors(), origin()), store.put(tensors(2.0), origin("run:2"))
    path, another = (tmp_path / "samples" / one.sample_id / f"{one.generation}.safetensors" for one in (ref, other))
    written = path.read_bytes()
    flipped = bytearray(written)
    flipped[-1] ^= 1
    for content in (bytes(flipped), another.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(KeyError, match=r"features of run:1 generation .* are damaged: \w+ is not what was written"):
            store.get(ref)
    path.write_bytes(written)
    assert store.get(ref)[0]["a"].eq(1).all()


def test_files_of_earlier_releases_have_no_checksums(tmp_path):
    store = SharedDirFeatureStore(tmp_path)
    ref = store.put(tensors(), origin())
    save_file(tensors(), tmp_path / "samples" / ref.sample_id / f"{ref.generation}.safetensors")
    assert store.get(ref)[0]["a"].eq(1).all()


def test_two_writers_cannot_take_the_same_room(tmp_path, monkeypatch):
    """Two objects on one folder stand for two processes: neither knows of the other."""
    stores = [SharedDirFeatureStore(tmp_path, capacity_bytes=1500) for _ in range(2)]
    monkeypatch.setattr(
        shared_dir, "save_file", lambda *arguments, **options: (time.sleep(0.2), save_file(*arguments, **options))
    )

    def put(index: int) -> bool:
        try:
            stores[index].put({"x": torch.zeros(1000, dtype=torch.uint8)}, origin(f"run:{index}"))
        except CapacityError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(put, range(2))) == [False, True]


def test_a_writer_that_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_dir, "LOCK_TIMEOUT_S", 0.1)
    store = SharedDirFeatureStore(tmp_path, capacity_bytes=1500)
    with (tmp_path / "capacity.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailableError, match=f"another process has been writing to {tmp_path} for"):
            store.put(tensors(), origin())


def test_a_file_system_without_locks_leaves_each_writer_its_own_check(tmp_path, monkeypatch):
    """A put failed there, and its prompts were blamed for it."""

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    store = SharedDirFeatureStore(tmp_path, capacity_bytes=10_000)
    store.get(store.put(tensors(), origin()))
    with pytest.raises(CapacityError):
        store.put({"x": torch.zeros(10_000)}, origin("run:2"))


def test_a_damaged_card_is_no_lost_sample(tmp_path):
    """Its error passed for missing features, so that every sample was captured again."""
    store = SharedDirFeatureStore(tmp_path)
    ref = store.put(tensors(), origin())
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(UserError, match="is no longer a feature store"):
        store.get(ref)


def test_a_changed_secret_is_noticed_by_every_call(tmp_path):
    store = SharedDirFeatureStore(tmp_path, secret="one")
    ref = store.put(tensors(), origin())
    (tmp_path / "store.json").unlink()
    SharedDirFeatureStore(tmp_path, secret="two")
    for call in (lambda: store.put(tensors(), origin()), lambda: store.get(ref), lambda: store.abort("run:1")):
        with pytest.raises(PermissionError):
            call()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot use"):
        SharedDirFeatureStore(tmp_path / "file")


def test_a_folder_that_another_process_removes_meanwhile(tmp_path, monkeypatch):
    store = SharedDirFeatureStore(tmp_path)
    real, raced = Path.mkdir, []

    def mkdir(self, *arguments, **options):
        real(self, *arguments, **options)
        if len(raced) < 3:
            raced.append(self)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert store.get(store.put(tensors(), origin()))
    assert len(raced) == 3


def test_sweep_removes_old_half_written_files(tmp_path):
    import os

    store = SharedDirFeatureStore(tmp_path)
    store.put(tensors(), origin())
    old, fresh = (tmp_path / "samples" / "run:1" / f"0-{name * 16}.tmp" for name in "ab")
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert store.sweep() == {"half_written": 1}
    assert fresh.exists()
    assert not old.exists()
    assert store.health()["num_samples"] == 1
