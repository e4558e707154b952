"""Features in the memory of this process."""

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lightning_dataflow.contracts import CapacityError, FeatureHandle, SampleOrigin, SampleRef
from lightning_dataflow.stores.base import FeatureStore, IsLive, Tensors, feature_specs, new_generation, num_bytes


@dataclass
class _Entry:
    generation: str
    tensors: Tensors
    num_bytes: int
    leases: set[str] = field(default_factory=set)


class MemoryFeatureStore(FeatureStore):
    """Consume-once store for target and trainer in one process.

    The last release of the current generation frees the sample. Thread-safe.

    Args:
        capacity_bytes: refuse puts beyond this payload; None for no limit.
    """

    def __init__(self, capacity_bytes: int | None = None):
        self.capacity_bytes = capacity_bytes
        self.uri = f"memory://{secrets.token_hex(8)}"
        self._entries: dict[str, _Entry] = {}
        self._resident_bytes = 0
        self._lock = threading.Lock()

    def put(self, tensors: Mapping[str, torch.Tensor], origin: SampleOrigin) -> SampleRef:
        """See FeatureStore.put."""
        specs = feature_specs(tensors)
        size = num_bytes(tensors)
        copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        generation = new_generation(origin.attempt)
        with self._lock:
            superseded = self._entries.get(origin.sample_id)
            if superseded and int(superseded.generation.split("-")[0]) > origin.attempt:  # this one is stale already
                return SampleRef(origin=origin, uri=self.uri, generation=generation, features=specs, num_bytes=size)
            resident = self._resident_bytes - (superseded.num_bytes if superseded else 0) + size
            if self.capacity_bytes is not None and resident > self.capacity_bytes:
                raise CapacityError(
                    f"{origin.sample_id} needs {size} bytes, {self._resident_bytes} of {self.capacity_bytes} are taken: "
                    "release samples first, or raise the store's capacity_bytes"
                )
            self._entries[origin.sample_id] = _Entry(generation, copies, size)
            self._resident_bytes = resident
        return SampleRef(origin=origin, uri=self.uri, generation=generation, features=specs, num_bytes=size)

    def get(self, ref: SampleRef) -> tuple[Tensors, FeatureHandle]:
        """See FeatureStore.get. The tensors are shared with the store: do not write to them."""
        if ref.uri != self.uri:
            raise self._elsewhere(ref)
        token = secrets.token_hex(8)
        with self._lock:
            entry = self._entries.get(ref.sample_id)
            if entry is None or entry.generation != ref.generation:
                state = "not here (freed, or never stored)" if entry is None else f"now at generation {entry.generation}"
                raise KeyError(f"features of {ref.sample_id} generation {ref.generation} are {state}")
            entry.leases.add(token)
            tensors = dict(entry.tensors)
        return tensors, FeatureHandle(sample_id=ref.sample_id, generation=ref.generation, lease_token=token)

    def release(self, handle: FeatureHandle) -> None:
        """See FeatureStore.release."""
        with self._lock:
            entry = self._entries.get(handle.sample_id)
            if entry is None or entry.generation != handle.generation or handle.lease_token not in entry.leases:
                return
            entry.leases.remove(handle.lease_token)
            if not entry.leases:
                self._free(handle.sample_id)

    def free(self, ref: SampleRef) -> None:
        """See FeatureStore.free."""
        with self._lock:
            entry = self._entries.get(ref.sample_id)
            if self._is(entry, ref):
                self._free(ref.sample_id)

    def abort(self, sample_id: str) -> None:
        """See FeatureStore.abort."""
        with self._lock:
            if sample_id in self._entries:
                self._free(sample_id)

    def exists(self, refs: Sequence[SampleRef]) -> list[bool]:
        """See FeatureStore.exists."""
        with self._lock:
            entries = [self._entries.get(ref.sample_id) for ref in refs]
        return [self._is(entry, ref) for entry, ref in zip(entries, refs, strict=True)]

    def health(self) -> dict[str, int]:
        """See FeatureStore.health."""
        with self._lock:
            return {
                "num_samples": len(self._entries),
                "num_bytes": self._resident_bytes,
                "capacity_bytes": self.capacity_bytes or 0,
            }

    def sweep(self, is_live: IsLive | None = None) -> dict[str, int]:
        """See FeatureStore.sweep. Nothing half-written survives a process."""
        if is_live is None:
            return {}
        with self._lock:
            orphans = [sample_id for sample_id, entry in self._entries.items() if not is_live(sample_id, entry.generation)]
            for sample_id in orphans:
                self._free(sample_id)
        return {"orphans": len(orphans)}

    def _is(self, entry: _Entry | None, ref: SampleRef) -> bool:
        return ref.uri == self.uri and entry is not None and entry.generation == ref.generation

    def _free(self, sample_id: str) -> None:
        self._resident_bytes -= self._entries.pop(sample_id).num_bytes
