"""Features as safetensors files in a folder that several processes share."""

import errno
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_dataflow.contracts import CapacityError, FeatureHandle, SampleOrigin, SampleRef, UserError
from lightning_dataflow.contracts.validation import check_id
from lightning_dataflow.stores.base import (
    FeatureStore,
    IsLive,
    Tensors,
    check_tensors,
    feature_specs,
    new_generation,
    num_bytes,
)

SUFFIX = ".safetensors"
CARD = "store.json"
ORPHAN_AGE_S = 600.0
ATTEMPTS = 10


class SharedDirFeatureStore(FeatureStore):
    """One file per sample and generation: `samples/{sample_id}/{generation}.safetensors`, put in place by a rename.

    A file's presence is the truth for every process: freeing unlinks it, and `get` looks again after its bytes have
    landed, so nobody is handed a freed sample.

    Args:
        root: the folder; made if missing.
        retain: `release` keeps the files, for several epochs over one capture.
        capacity_bytes: refuse puts beyond this payload, counted over all processes; None for no limit.
        secret: attach and every data call raise PermissionError unless it is the one the folder was made with.

    Raises:
        UserError: the folder cannot be written.
        PermissionError: wrong secret.
    """

    def __init__(
        self, root: str | Path, *, retain: bool = False, capacity_bytes: int | None = None, secret: str | None = None
    ):
        self.root = Path(root).resolve()
        self.retain = retain
        self.capacity_bytes = capacity_bytes
        self._samples = self.root / "samples"
        try:
            self._samples.mkdir(parents=True, exist_ok=True)
            self._digest = self._attach(secret)
        except PermissionError as error:
            if error.errno is None:
                raise  # the secret, not the file system
            raise UserError(f"cannot write to {self.root}: {error.strerror}; choose another folder") from error
        except OSError as error:
            raise UserError(f"cannot use {self.root} as a store: {error.strerror}; choose another folder") from error
        self.uri = f"shared_dir://{self._card()['store_id']}"

    def put(self, tensors: Mapping[str, torch.Tensor], origin: SampleOrigin) -> SampleRef:
        """See FeatureStore.put. With `capacity_bytes`, each put walks the whole folder."""
        self._check_secret()
        specs = feature_specs(tensors)
        size = num_bytes(tensors)
        self._check_capacity(origin.sample_id, size)
        folder = self._folder(origin.sample_id)
        generation = new_generation(origin.attempt)
        plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        self._write(folder, generation, plain)
        for other in _generations(folder):
            if other.stem != generation and _attempt(other.stem) <= origin.attempt:
                other.unlink(missing_ok=True)
        if any(_attempt(other.stem) > origin.attempt for other in _generations(folder)):
            self._path(origin.sample_id, generation).unlink(missing_ok=True)  # a newer attempt was first
        return SampleRef(origin=origin, uri=self.uri, generation=generation, features=specs, num_bytes=size)

    def get(self, ref: SampleRef) -> tuple[Tensors, FeatureHandle]:
        """See FeatureStore.get. The tensors are private copies."""
        self._check_secret()
        if ref.uri != self.uri:
            raise self._elsewhere(ref)
        path = self._path(ref.sample_id, ref.generation)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError) as error:
            raise KeyError(f"features of {ref.sample_id} generation {ref.generation} cannot be read: {error}") from error
        check_tensors(tensors, ref)
        if not path.exists():
            raise KeyError(f"features of {ref.sample_id} generation {ref.generation} were freed during the read")
        handle = FeatureHandle(sample_id=ref.sample_id, generation=ref.generation, lease_token=secrets.token_hex(8))
        return tensors, handle

    def release(self, handle: FeatureHandle) -> None:
        """See FeatureStore.release. With `retain` the files stay; otherwise the first release frees them."""
        self._check_secret()
        if not self.retain:
            self._path(handle.sample_id, handle.generation).unlink(missing_ok=True)
            _remove_empty(self._folder(handle.sample_id))

    def free(self, ref: SampleRef) -> None:
        """See FeatureStore.free; also what was to be retained."""
        self._check_secret()
        if ref.uri == self.uri:
            self._path(ref.sample_id, ref.generation).unlink(missing_ok=True)
            _remove_empty(self._folder(ref.sample_id))

    def abort(self, sample_id: str) -> None:
        """See FeatureStore.abort."""
        self._check_secret()
        folder = self._folder(sample_id)
        for path in _generations(folder):
            path.unlink(missing_ok=True)
        _remove_empty(folder)

    def exists(self, refs: Sequence[SampleRef]) -> list[bool]:
        """See FeatureStore.exists."""
        self._check_secret()
        return [ref.uri == self.uri and self._path(ref.sample_id, ref.generation).exists() for ref in refs]

    def clear(self) -> None:
        """See FeatureStore.clear. With `retain` the files stay."""
        if not self.retain:
            self.sweep(lambda sample_id, generation: False)

    def health(self) -> dict[str, int]:
        """See FeatureStore.health; `num_bytes` counts whole files. Walks the folder: not for hot paths."""
        sizes = list(self._file_sizes())
        return {"num_samples": len(sizes), "num_bytes": sum(sizes), "capacity_bytes": self.capacity_bytes or 0}

    def sweep(self, is_live: IsLive | None = None) -> dict[str, int]:
        """See FeatureStore.sweep. A file counts as half-written when its writer has not finished it in ten minutes."""
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

    def _attach(self, secret: str | None) -> str:
        """Write the store's card once; whoever comes second finds it. Returns the digest that the card must show."""
        if not (self.root / CARD).exists():  # a reader may have a mount that it cannot write to
            salt = secrets.token_hex(16)
            card = {"store_id": secrets.token_hex(8), "salt": salt, "digest": _digest(secret, salt)}
            temporary = self.root / f".store-{secrets.token_hex(8)}.tmp"
            temporary.write_text(json.dumps(card))
            try:
                with suppress(FileExistsError):
                    os.link(temporary, self.root / CARD)
            finally:
                temporary.unlink()
        digest = _digest(secret, self._card()["salt"])
        self._check_digest(digest)
        return digest

    def _card(self) -> dict[str, str]:
        return json.loads((self.root / CARD).read_text())

    def _check_secret(self) -> None:
        self._check_digest(self._digest)

    def _check_digest(self, digest: str) -> None:
        try:
            card = self._card()
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{self.root} is no longer a feature store ({error}): point at the folder again") from error
        if not hmac.compare_digest(card["digest"], digest):
            raise PermissionError(f"the secret does not match the store in {self.root}: use the one it was made with")

    def _check_capacity(self, sample_id: str, size: int) -> None:
        if self.capacity_bytes is None:
            return
        superseded = sum(_size(path) for path in _generations(self._folder(sample_id)))
        taken = sum(self._file_sizes()) - superseded
        if taken + size > self.capacity_bytes:
            raise CapacityError(
                f"{sample_id} needs {size} bytes, {taken} of {self.capacity_bytes} are taken in {self.root}: "
                "release samples first, or raise the store's capacity_bytes"
            )

    def _write(self, folder: Path, generation: str, tensors: Tensors) -> None:
        temporary = folder / f"{generation}.tmp"
        try:
            for _ in range(ATTEMPTS):
                # Another process may free the sample and remove its folder meanwhile.
                with suppress(FileNotFoundError, FileExistsError):
                    folder.mkdir(exist_ok=True)
                    temporary.touch()
                    break
            save_file(tensors, temporary)
            os.replace(temporary, folder / f"{generation}{SUFFIX}")
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)
            if full:
                raise CapacityError(f"the disk of {self.root} is full: free some space and start again") from error
            raise

    def _file_sizes(self) -> Iterator[int]:
        for folder in self._samples.iterdir():
            for path in _generations(folder):
                yield _size(path)

    def _folder(self, sample_id: str) -> Path:
        return self._samples / check_id(sample_id, "sample_id")

    def _path(self, sample_id: str, generation: str) -> Path:
        return self._folder(sample_id) / f"{check_id(generation, 'generation')}{SUFFIX}"


def _attempt(generation: str) -> int:
    return int(generation.split("-")[0])


def _size(path: Path) -> int:
    """0 when another process has just freed the file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _generations(folder: Path) -> list[Path]:
    return list(folder.glob(f"*{SUFFIX}"))


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EEXIST):
            raise


def _digest(secret: str | None, salt: str) -> str:
    return hashlib.scrypt((secret or "").encode(), salt=salt.encode(), n=2**12, r=8, p=1).hex()
