"""The card of a store's folder: it names the store, and lets processes prove that they know its secret."""

import hashlib
import hmac
import json
import os
import secrets
import zlib
from contextlib import suppress
from pathlib import Path

import torch

from lightning_dataflow.contracts import SampleRef, UserError
from lightning_dataflow.contracts.foreign import parse_json, read_bounded
from lightning_dataflow.contracts.validation import check_id
from lightning_dataflow.stores.base import Tensors

FILE = "store.json"
MAX_CARD_BYTES = 1 << 16


class StoreCard:
    """The first process to attach writes the card; all others must have the same secret.

    The card holds half of what scrypt derives from the secret. The other half signs files: an HMAC over the ids and the
    bytes of a sample's features. Without a secret, files carry checksums, which reveal damage and guard against nobody.

    Raises:
        PermissionError: wrong secret.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, root: Path, secret: str | None):
        self._path = root / FILE
        if not self._path.exists():  # a reader may have a mount that it cannot write to
            self._write(secret)
        card = self._read()
        self.store_id = card["store_id"]
        self._digest, key = _derive(secret, card["salt"])
        self._key = None if secret is None else key
        self.check()

    def check(self) -> None:
        """Raise PermissionError when the folder has another secret by now, and UserError when it is no store any more."""
        if not hmac.compare_digest(self._read()["digest"], self._digest):
            raise PermissionError(
                f"the secret does not match the store in {self._path.parent}: use the one it was made with"
            )

    def sign(self, ref: SampleRef, tensors: Tensors) -> dict[str, str]:
        """What a file of `ref` says to prove that its writer knew the secret; without one, the checksum of each tensor."""
        ids = f"{self.store_id}/{ref.sample_id}/{ref.generation}"
        if self._key is None:
            return {f"crc32.{name}": _checksum(tensor, f"{ids}/{name}") for name, tensor in tensors.items()}
        mac = hmac.new(self._key, ids.encode(), "sha256")
        for name, tensor in sorted(tensors.items()):
            mac.update(f"/{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
            mac.update(_bytes(tensor))
        return {"hmac": mac.hexdigest()}

    def verify(self, ref: SampleRef, tensors: Tensors, metadata: dict[str, str]) -> None:
        """Compare `metadata` with what `sign` returns for these tensors. Files of earlier releases have no checksums.

        Raises:
            KeyError: a checksum differs.
            PermissionError: the signature differs, or there is none.
        """
        for name, value in self.sign(ref, tensors).items():
            known = metadata.get(name, "")
            if self._key is None and known not in ("", value):
                raise KeyError(
                    f"features of {ref.sample_id} generation {ref.generation} are damaged: {name.removeprefix('crc32.')} "
                    f"is not what was written (crc32 {value}, then {known})"
                )
            if self._key is not None and not hmac.compare_digest(known, value):
                raise PermissionError(
                    f"{ref.sample_id} generation {ref.generation} was not written with this store's secret (or by version "
                    f"0.1, which signed nothing), or is damaged: remove {self._path.parent} and capture again"
                )

    def _write(self, secret: str | None) -> None:
        salt = secrets.token_hex(16)
        card = {"store_id": secrets.token_hex(8), "salt": salt, "digest": _derive(secret, salt)[0]}
        temporary = self._path.with_name(f".store-{secrets.token_hex(8)}.tmp")
        temporary.write_text(json.dumps(card))
        try:
            with suppress(FileExistsError):  # another process was first
                os.link(temporary, self._path)
        finally:
            temporary.unlink()

    def _read(self) -> dict[str, str]:
        try:
            card = parse_json(read_bounded(self._path, MAX_CARD_BYTES), str(self._path), MAX_CARD_BYTES)
            return {name: check_id(card[name], name) for name in ("store_id", "salt", "digest")}
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path.parent} is no longer a feature store ({error!r}): point at the folder again"
            ) from error


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensor: torch.Tensor, ids: str) -> str:
    """CRC-32 reads 1.4 GB/s on a core, about as fast as a disk."""
    start = zlib.crc32(f"{ids}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
    return f"{zlib.crc32(_bytes(tensor), start):08x}"


def _derive(secret: str | None, salt: str) -> tuple[str, bytes]:
    """(what the card shows, the key of signatures); neither part of scrypt's output tells anything of the other."""
    derived = hashlib.scrypt((secret or "").encode(), salt=salt.encode(), n=2**12, r=8, p=1, dklen=96)
    return derived[:64].hex(), derived[64:]
