"""Features in the memory of this process."""

import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lightning_dataflow.contracts import FeatureHandle, SampleOrigin, SampleRef
from lightning_dataflow.stores.base import FeatureStore, IsLive, Leases, Tensors, check_room, new_ref, of_another_store


class _Entry(NamedTuple):
    ref: SampleRef
    tensors: Tensors


class MemoryFeatureStore(FeatureStore):
    """Consume-once store for target and trainer in one process. Thread-safe.

    Args:
        capacity_bytes: refuse puts beyond this payload; None for no limit.
    """

    def __init__(self, capacity_bytes: int | None = None):
        self.capacity_bytes = capacity_bytes
        self.uri = f"memory://{secrets.token_hex(8)}"
        self._entries: dict[str, _Entry] = {}
        self._leases = Leases()
        self._lock = threading.Lock()

    def put(self, tensors: Mapping[str, torch.Tensor], origin: SampleOrigin) -> SampleRef:
        ref = new_ref(tensors, origin, self.uri)
        copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        with self._lock:
            old = self._entries.get(ref.sample_id)
            if old is not None and old.ref.origin.attempt > origin.attempt:
                return ref  # stale already
            check_room(ref, self._num_bytes() - (old.ref.num_bytes if old else 0), self.capacity_bytes)
            self._entries[ref.sample_id] = _Entry(ref, copies)
        return ref

    def get(self, ref: SampleRef) -> tuple[Tensors, FeatureHandle]:
        """Read without a copy: the tensors are shared with the store, do not write to them."""
        if ref.uri != self.uri:
            raise of_another_store(ref, self.uri)
        with self._lock:
            if not self._holds(ref):
                raise KeyError(f"features of {ref.sample_id} generation {ref.generation} were freed or superseded")
            return dict(self._entries[ref.sample_id].tensors), self._leases.grant(ref)

    def release(self, handle: FeatureHandle) -> None:
        with self._lock:
            ref = self._leases.end(handle)
            if ref is not None and self._holds(ref):
                del self._entries[ref.sample_id]

    def free(self, ref: SampleRef) -> None:
        with self._lock:
            if self._holds(ref):
                del self._entries[ref.sample_id]

    def abort(self, sample_id: str) -> None:
        with self._lock:
            self._entries.pop(sample_id, None)

    def exists(self, refs: Sequence[SampleRef]) -> list[bool]:
        with self._lock:
            return [self._holds(ref) for ref in refs]

    def health(self) -> dict[str, int]:
        with self._lock:
            return {
                "num_samples": len(self._entries),
                "num_bytes": self._num_bytes(),
                "capacity_bytes": self.capacity_bytes or 0,
            }

    def sweep(self, is_live: IsLive | None = None) -> dict[str, int]:
        if is_live is None:
            return {}
        with self._lock:
            orphans = [name for name, entry in self._entries.items() if not is_live(name, entry.ref.generation)]
            for sample_id in orphans:
                del self._entries[sample_id]
        return {"orphans": len(orphans)}

    def _num_bytes(self) -> int:
        return sum(entry.ref.num_bytes for entry in self._entries.values())

    def _holds(self, ref: SampleRef) -> bool:
        entry = self._entries.get(ref.sample_id)
        return entry is not None and (entry.ref.uri, entry.ref.generation) == (ref.uri, ref.generation)
