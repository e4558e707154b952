"""Features as safetensors files in a folder that several processes share."""

import errno
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_dataflow.contracts import CapacityError, FeatureHandle, SampleOrigin, SampleRef, UserError
from lightning_dataflow.contracts.errors import NO_LOCKS
from lightning_dataflow.contracts.validation import check_id
from lightning_dataflow.contracts.waiting import try_lock, wait_until
from lightning_dataflow.stores.base import (
    FeatureStore,
    IsLive,
    Leases,
    StoreUnavailableError,
    Tensors,
    attempt_of,
    check_room,
    check_tensors,
    new_ref,
    of_another_store,
)
from lightning_dataflow.stores.card import StoreCard

SUFFIX = ".safetensors"
LOCK = "capacity.lock"
LOCK_TIMEOUT_S, LOCK_POLL_S = 60.0, 0.01
ORPHAN_AGE_S = 600.0
MKDIR_TRIES = 10
MAX_HEADER_BYTES = 1 << 20


class SharedDirFeatureStore(FeatureStore):
    """One file per sample and generation: `samples/{sample_id}/{generation}.safetensors`, put in place by a rename.

    The presence of a file is the truth for every process: freeing unlinks it, and `get` checks again after its bytes have
    landed, so a freed sample is never returned. A file carries a checksum of each tensor, and one that differs is as lost
    as a missing one. Leases are counted in this process: the last one frees the sample for all.

    Args:
        root: the folder; made if missing.
        retain: `release` keeps the files, for several epochs over one capture.
        capacity_bytes: refuse puts beyond this payload, counted over all processes, which then write one at a time; None
            for no limit.
        secret: attach and every data call raise PermissionError unless it is the one the folder was made with, and so
            does the `get` of a file that was written without it.

    Raises:
        UserError: the folder cannot be written.
        PermissionError: wrong secret.
    """

    def __init__(
        self, root: str | Path, *, retain: bool = False, capacity_bytes: int | None = None, secret: str | None = None
    ):
        self.root = Path(root).resolve()
        self.retain, self.capacity_bytes = retain, capacity_bytes
        self._samples = self.root / "samples"
        self._leases = Leases()
        try:
            self._samples.mkdir(parents=True, exist_ok=True)
            self._card = StoreCard(self.root, secret)
        except OSError as error:
            if error.errno is None:
                raise  # the secret, not the file system
            raise UserError(f"cannot use {self.root} as a store: {error.strerror}; choose another folder") from error
        self.uri = f"shared_dir://{self._card.store_id}"

    def put(self, tensors: Mapping[str, torch.Tensor], origin: SampleOrigin) -> SampleRef:
        """Write a file. With `capacity_bytes`, each put walks the whole folder.

        Raises:
            StoreUnavailableError: with `capacity_bytes`, another process has been writing for too long.
        """
        self._card.check()
        ref = new_ref(tensors, origin, self.uri)
        path = self._path(ref)
        with self._room(ref, path.parent):
            self._write(ref, {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()})
            others = [other for other in _generations(path.parent) if other != path]
            for other in others:
                if attempt_of(other.stem) <= origin.attempt:
                    other.unlink(missing_ok=True)
            if any(attempt_of(other.stem) > origin.attempt for other in others):
                path.unlink(missing_ok=True)  # a newer attempt was first
        return ref

    def get(self, ref: SampleRef) -> tuple[Tensors, FeatureHandle]:
        """Read a file and check its bytes; the tensors are private copies."""
        self._card.check()
        if ref.uri != self.uri:
            raise of_another_store(ref, self.uri)
        path = self._path(ref)
        try:
            if (size := path.stat().st_size) > ref.num_bytes + MAX_HEADER_BYTES:  # before memory is taken for it
                raise KeyError(f"features of {ref.sample_id} have {size} bytes, the ref says {ref.num_bytes}")
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (FileNotFoundError, SafetensorError) as error:
            raise KeyError(f"features of {ref.sample_id} generation {ref.generation} cannot be read: {error}") from error
        check_tensors(tensors, ref)
        self._card.verify(ref, tensors, metadata)
        if not path.exists():
            raise KeyError(f"features of {ref.sample_id} generation {ref.generation} were freed during the read")
        return tensors, self._leases.grant(ref)

    def release(self, handle: FeatureHandle) -> None:
        self._card.check()
        ref = self._leases.end(handle)
        if ref is not None and not self.retain:
            _remove(self._path(ref))

    def free(self, ref: SampleRef) -> None:
        """Free one generation, even with `retain`."""
        self._card.check()
        if ref.uri == self.uri:
            _remove(self._path(ref))

    def abort(self, sample_id: str) -> None:
        self._card.check()
        for path in _generations(self._folder(sample_id)):
            _remove(path)

    def exists(self, refs: Sequence[SampleRef]) -> list[bool]:
        self._card.check()
        return [ref.uri == self.uri and self._path(ref).exists() for ref in refs]

    def clear(self) -> None:
        """Remove all files, unless they are to be retained."""
        if not self.retain:
            self.sweep(lambda sample_id, generation: False)

    def health(self) -> dict[str, int]:
        """Counts; `num_bytes` is of whole files. Walks the folder, so do not call it often."""
        sizes = self._file_sizes()
        return {"num_samples": len(sizes), "num_bytes": sum(sizes), "capacity_bytes": self.capacity_bytes or 0}

    def sweep(self, is_live: IsLive | None = None) -> dict[str, int]:
        """Remove orphans, and files that their writer has not finished in ten minutes."""
        half_written = orphans = 0
        for folder in self._samples.iterdir():
            for path in folder.glob("*.tmp"):
                with suppress(FileNotFoundError):  # its writer has just renamed it
                    if time.time() - path.stat().st_mtime > ORPHAN_AGE_S:
                        path.unlink()
                        half_written += 1
            for path in _generations(folder):
                if is_live is not None and not is_live(folder.name, path.stem):
                    path.unlink(missing_ok=True)
                    orphans += 1
            _remove_empty(folder)
        return {"half_written": half_written} | ({} if is_live is None else {"orphans": orphans})

    @contextmanager
    def _room(self, ref: SampleRef, folder: Path) -> Iterator[None]:
        """Check the capacity, and keep other writers from doing so until the file of `ref` counts."""
        if self.capacity_bytes is None:
            yield
            return
        with (self.root / LOCK).open("a") as lock:
            self._wait_for(lock.fileno())
            superseded = sum(map(_size, _generations(folder)))
            check_room(ref, sum(self._file_sizes()) - superseded, self.capacity_bytes)
            yield

    def _wait_for(self, lock: int) -> None:
        try:
            is_locked = wait_until(
                lambda: try_lock(lock), LOCK_TIMEOUT_S, LOCK_POLL_S, f"a process that writes to {self.root}"
            )
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return  # each writer then checks the capacity by itself
        if not is_locked:
            raise StoreUnavailableError(
                f"another process has been writing to {self.root} for {LOCK_TIMEOUT_S:.0f} s: end it if it hangs"
            )

    def _write(self, ref: SampleRef, tensors: Tensors) -> None:
        path = self._path(ref)
        temporary = path.with_suffix(".tmp")
        try:
            for _ in range(MKDIR_TRIES):
                # Another process may free the sample and remove its folder meanwhile.
                with suppress(FileNotFoundError, FileExistsError):
                    path.parent.mkdir(exist_ok=True)
                    temporary.touch()
                    break
            save_file(tensors, temporary, metadata=self._card.sign(ref, tensors))
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error):
                raise CapacityError(f"the disk of {self.root} is full: free some space and start again") from error
            raise

    def _file_sizes(self) -> list[int]:
        return [_size(path) for folder in self._samples.iterdir() for path in _generations(folder)]

    def _folder(self, sample_id: str) -> Path:
        return self._samples / check_id(sample_id, "sample_id")

    def _path(self, ref: SampleRef) -> Path:
        return self._folder(ref.sample_id) / f"{check_id(ref.generation, 'generation')}{SUFFIX}"


def _size(path: Path) -> int:
    """0 when another process has just freed the file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _generations(folder: Path) -> list[Path]:
    return list(folder.glob(f"*{SUFFIX}"))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _remove_empty(path.parent)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or gone already
        folder.rmdir()
