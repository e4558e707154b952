"""Features in a Mooncake store: tensors between machines, or between processes of one through shared memory."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from lightning_dataflow.contracts import CapacityError, FeatureHandle, SampleOrigin, SampleRef
from lightning_dataflow.contracts.validation import check_id
from lightning_dataflow.stores.base import FeatureStore, IsLive, Tensors, feature_specs, new_generation, num_bytes
from lightning_dataflow.stores.mooncake.buffers import MAX_IDLE_BYTES
from lightning_dataflow.stores.mooncake.client import (
    NO_SPACE,
    NOT_FOUND,
    OWNER_GONE,
    MooncakeAdmin,
    MooncakeClient,
    OwnerGoneError,
    StoreUnavailableError,
    TransientError,
)
from lightning_dataflow.stores.mooncake.keys import KeyScheme
from lightning_dataflow.stores.mooncake.transfer import BlobTransfer, TensorTransfer, Transfer

MAX_REMEMBERED_PUTS = 1 << 14


class MooncakeFeatureStore(FeatureStore):
    """One hard-pinned object per tensor: `{store_id}/{sample_id}/g{generation}/{feature}`; shapes travel on the ref.

    Freeing is by force and seen by every process at once, also while Mooncake's own read lease (10 s from a read) lives.
    That is sound because `get` asks, *after* its bytes have landed, whether their keys still exist: a generation is never
    used twice, so a key that is there after the read was there all the time, and its memory cannot have been given to
    another object. Who reads a sample while it is freed gets a KeyError, never mixed bytes.

    Attempts order across processes: before a put of attempt n > 0 removes what is older, it leaves a one-byte object
    `{sample_id}/superseded/{k}` for every k < n, and a generation of attempt k counts only while that mark is absent. So
    what a late put of an older attempt stores is stale at once, whoever was first. It goes with the generation that left
    the marks, and they go last. Not promised: that two puts of the *same* attempt by different processes supersede each
    other; that an attempt is recognised as late by a put more than 32 attempts ahead; marks while the newest generation of
    a sample is freed and put again at the same moment. The control plane, which hands out attempts, prevents all three.

    Thread-safe. Objects that a crashed writer left incomplete are discarded by the master
    (`--put_start_discard_timeout_sec`).

    Args:
        store_id: separates stores that share a Mooncake; use the same in every process of a run, and no other run's. The
            log of a run has a nonce for it.
        master_address: host:port of `mooncake_master`.
        client_address: host:port of a `mooncake_client` on this machine, to go through shared memory; None for a
            direct connection with `protocol`, `rdma_devices` and `local_hostname` (this machine as others see it).
        metrics_address: host:port of the master's metrics; `sweep` with `is_live` needs it, and `health` is exact with it.
        zero_copy: False stores one safetensors blob per sample through Mooncake's plain calls. All processes must agree.
        retain: `release` keeps the samples, for several epochs over one capture.
        capacity_bytes: how much Mooncake holds, where known, for messages; the limit itself is Mooncake's.
        max_idle_bytes: transfer buffers that are kept for reuse.
        staging_bytes: with `zero_copy=False`, the largest sample.
        owner_timeout_s: how long to wait for a storage process that is gone (the master notices after 10 s).
        unavailable_timeout_s: how long to wait for a master or `mooncake_client` that is gone.

    Raises:
        UserError: mooncake is not installed, or nothing listens at an address.
        StoreUnavailableError: from every call, when Mooncake stayed away.
    """

    def __init__(
        self,
        store_id: str,
        *,
        master_address: str,
        client_address: str | None = None,
        metrics_address: str | None = None,
        protocol: str = "tcp",
        rdma_devices: str = "",
        local_hostname: str = "127.0.0.1",
        zero_copy: bool = True,
        retain: bool = False,
        capacity_bytes: int | None = None,
        max_idle_bytes: int = MAX_IDLE_BYTES,
        staging_bytes: int = 256 << 20,
        owner_timeout_s: float = 15.0,
        unavailable_timeout_s: float = 20.0,
    ):
        self.store_id = check_id(store_id, "store_id")
        self._names = KeyScheme(self.store_id)
        self.uri = f"mooncake://{store_id}"
        self.retain, self.capacity_bytes = retain, capacity_bytes
        self._admin = MooncakeAdmin(metrics_address) if metrics_address else None
        self._client = MooncakeClient(
            master_address=master_address,
            client_address=client_address,
            protocol=protocol,
            rdma_devices=rdma_devices,
            local_hostname=local_hostname,
            staging_bytes=0 if zero_copy else staging_bytes,
            owner_timeout_s=owner_timeout_s,
            unavailable_timeout_s=unavailable_timeout_s,
        )
        self._transfer: Transfer = (
            TensorTransfer(self._client, max_idle_bytes=max_idle_bytes) if zero_copy else BlobTransfer(self._client)
        )
        self._lock = threading.Lock()  # never held while bytes move
        self._puts: OrderedDict[str, SampleRef] = OrderedDict()  # the last put of a sample by this process
        self._leases: dict[tuple[str, str], tuple[SampleRef, set[str]]] = {}

    def put(self, tensors: Mapping[str, torch.Tensor], origin: SampleOrigin) -> SampleRef:
        """See FeatureStore.put. The older generation goes first, so that its space can be used.

        Raises:
            CapacityError: no room. Samples that this one was to replace are gone.
        """
        specs = feature_specs(tensors)
        for name in (origin.sample_id, *specs):
            check_id(name, "id")
        draft = SampleRef(origin=origin, uri=self.uri, generation="", features=specs, num_bytes=num_bytes(tensors))
        if not draft.num_bytes:
            raise ValueError(f"{origin.sample_id} has only empty tensors: Mooncake cannot store 0 bytes")
        if self.capacity_bytes is not None:
            _check_fits(origin.sample_id, draft.num_bytes, self.capacity_bytes)
        staged = self._transfer.stage(tensors)
        self._remove_older(origin)
        ref = self._client.retry(lambda: self._store(draft, staged))
        self._remember(ref)
        return ref

    def get(self, ref: SampleRef) -> tuple[Tensors, FeatureHandle]:
        """See FeatureStore.get. The tensors are private; their memory is used again when nobody references them."""
        (found,) = self.get_many([ref])
        if isinstance(found, KeyError):
            raise found
        return found

    def get_many(self, refs: Sequence[SampleRef]) -> list[tuple[Tensors, FeatureHandle] | KeyError]:
        """See FeatureStore.get_many. Two round trips: the bytes, and whether they still count."""
        ours = [ref for ref in refs if ref.uri == self.uri]
        found = iter(self._get_ours(ours) if ours else [])
        return [next(found) if ref.uri == self.uri else self._elsewhere(ref) for ref in refs]

    def _get_ours(self, refs: Sequence[SampleRef]) -> list[tuple[Tensors, FeatureHandle] | KeyError]:
        try:
            found = self._client.retry(lambda: self._read(refs))
        except OwnerGoneError as error:
            if len(refs) > 1:  # others may have another owner
                return [one for ref in refs for one in self._get_ours([ref])]
            return [KeyError(f"{_name(refs[0])} is lost: {error}")]
        return [one if isinstance(one, KeyError) else (one, self._lease(ref)) for ref, one in zip(refs, found, strict=True)]

    def release(self, handle: FeatureHandle) -> None:
        """See FeatureStore.release. Leases are counted in this process: the last one frees the sample for all."""
        self.release_many([handle])

    def release_many(self, handles: Sequence[FeatureHandle]) -> None:
        """See FeatureStore.release_many. One round trip."""
        last = [ref for handle in handles if (ref := self._end_lease(handle)) is not None]
        if self.retain:
            return
        self._remove([key for ref in last if ref.origin.attempt == 0 for key in self._keys(ref)])
        for ref in last:
            if ref.origin.attempt:
                self.free(ref)

    def free(self, ref: SampleRef) -> None:
        """See FeatureStore.free; also what was to be retained."""
        if ref.uri != self.uri:
            return
        with self._lock:
            self._leases.pop((ref.sample_id, ref.generation), None)
        keys, origin = self._keys(ref), ref.origin
        if origin.attempt == 0:
            self._remove(keys)
            return
        there, superseded = self._exist([keys[0], self._names.mark(origin.sample_id, origin.attempt)])
        self._remove(keys)
        if there and not superseded:
            self._remove_matching(self._names.pattern_up_to(origin.sample_id, origin.attempt - 1))  # what came late
            self._remove(self._names.marks(origin))

    def abort(self, sample_id: str) -> None:
        """See FeatureStore.abort. Asks the master to look through all its keys: about 1 ms for a thousand."""
        check_id(sample_id, "sample_id")
        with self._lock:
            self._puts.pop(sample_id, None)
            for lease in [lease for lease in self._leases if lease[0] == sample_id]:
                del self._leases[lease]
        self._remove_matching(self._names.pattern_of_sample(sample_id))

    def exists(self, refs: Sequence[SampleRef]) -> list[bool]:
        """See FeatureStore.exists. One call for all."""
        ours = [ref for ref in refs if ref.uri == self.uri]
        wanted = {key for ref in ours for key in (*self._keys(ref), self._names.mark(ref.sample_id, ref.origin.attempt))}
        found = dict(zip(wanted, self._exist(list(wanted)), strict=True))

        def there(ref: SampleRef) -> bool:
            return (
                all(found[key] for key in self._keys(ref))
                and not found[self._names.mark(ref.sample_id, ref.origin.attempt)]
            )

        return [ref.uri == self.uri and there(ref) for ref in refs]

    def health(self) -> dict[str, int]:
        """See FeatureStore.health.

        With `metrics_address`, `num_bytes` and `capacity_bytes` are those of the whole Mooncake, which other stores may
        share, and `num_samples` (this store's generations) lists all keys. Without, the counts are of what this process
        put lately and is still there, and the capacity is what the constructor was told.
        """
        if self._admin is None:
            with self._lock:
                refs = list(self._puts.values())
            there = [ref for ref, found in zip(refs, self.exists(refs), strict=True) if found]
            size = sum(ref.num_bytes for ref in there)
            return {"num_samples": len(there), "num_bytes": size, "capacity_bytes": self.capacity_bytes or 0}
        generations, marks = self._names.sort(self._admin.list_keys())
        attempts = [(sample_id, int(generation.split("-")[0])) for sample_id, generation in generations]
        return {
            "num_samples": sum(self._names.mark(*attempt) not in marks for attempt in attempts),
            "num_bytes": self._admin.gauge("master_allocated_bytes"),
            "capacity_bytes": self._admin.gauge("master_total_capacity_bytes"),
        }

    def sweep(self, is_live: IsLive | None = None) -> dict[str, int]:
        """See FeatureStore.sweep. Half-written objects are the master's to discard, so without `is_live` nothing is done.

        Only the master's HTTP port lists keys: without `metrics_address` orphans stay until `clear`.
        """
        if is_live is None or self._admin is None:
            return {}
        generations, marks = self._names.sort(self._admin.list_keys())
        orphans = [generation for generation in generations if not is_live(*generation)]
        live = {sample_id for sample_id, _ in generations.keys() - set(orphans)}
        keys = [key for generation in orphans for key in generations[generation]]
        self._remove(keys + [mark for mark in marks if mark.split("/")[1] not in live])
        return {"orphans": len(orphans)}

    def clear(self) -> None:
        """Remove everything under this store_id, for every process: the end of a run."""
        with self._lock:
            self._puts.clear()
            self._leases.clear()
        self._remove_matching(self._names.pattern_of_store())

    def stop_waiting(self) -> None:
        """See FeatureStore.stop_waiting. Calls raise StoreUnavailableError at once where Mooncake is gone."""
        self._client.stop_waiting()

    def close(self) -> None:
        """See FeatureStore.close. Tensors that were read stay valid."""
        self._transfer.close()
        self._client.close()

    def _store(self, draft: SampleRef, staged: Any) -> SampleRef:
        """Try once, under a generation of its own: to a put on an existing key Mooncake answers 0 and stores nothing, so
        after a failure nobody knows what another put under the same keys would leave.
        """
        ref = replace(draft, generation=new_generation(draft.origin.attempt))
        keys = self._keys(ref)
        try:
            codes = self._transfer.write(keys, staged)
        except TransientError:
            with suppress(TransientError):
                self._client.remove(keys)
            raise
        if any(codes):
            self._client.remove(keys)  # a batch is not atomic: some may have been stored
            raise self._refusal(draft.sample_id, draft.num_bytes, codes)
        return ref

    def _remove_older(self, origin: SampleOrigin) -> None:
        """Remove what a put of `origin` supersedes; see the class on marks."""
        with self._lock:
            previous = self._puts.get(origin.sample_id)
        if origin.attempt:
            older = self._names.pattern_up_to(origin.sample_id, origin.attempt)
            self._remove_matching(older)  # first, for the marks may need its room
            self._client.retry(lambda: self._leave_marks(origin))
            self._remove_matching(older)
        elif previous is not None and previous.origin.attempt == 0:
            self.free(previous)

    def _leave_marks(self, origin: SampleOrigin) -> None:
        codes = self._transfer.write_marks(self._names.marks(origin))
        if any(codes):
            raise self._refusal(origin.sample_id, len(codes), codes)

    def _read(self, refs: Sequence[SampleRef]) -> list[Tensors | KeyError]:
        wanted = [(self._keys(ref), ref) for ref in refs]
        found = self._transfer.read(wanted)
        checks = [(*keys, self._names.mark(ref.sample_id, ref.origin.attempt)) for keys, ref in wanted]
        there = iter(self._client.exist([key for check in checks for key in check]))
        for index, check in enumerate(checks):
            *complete, superseded = (next(there) for _ in check)
            if (superseded or not all(complete)) and not isinstance(found[index], KeyError):
                found[index] = KeyError(f"{_name(refs[index])} was freed or superseded")
        return found

    def _lease(self, ref: SampleRef) -> FeatureHandle:
        token = secrets.token_hex(8)
        with self._lock:
            self._leases.setdefault((ref.sample_id, ref.generation), (ref, set()))[1].add(token)
        return FeatureHandle(sample_id=ref.sample_id, generation=ref.generation, lease_token=token)

    def _end_lease(self, handle: FeatureHandle) -> SampleRef | None:
        """The ref whose last lease this was."""
        with self._lock:
            ref, tokens = self._leases.get((handle.sample_id, handle.generation), (None, set()))
            if ref is None or handle.lease_token not in tokens:
                return None
            tokens.remove(handle.lease_token)
            if tokens:
                return None
            del self._leases[handle.sample_id, handle.generation]
        return ref

    def _refusal(self, sample_id: str, size: int, codes: list[int]) -> Exception:
        if NO_SPACE not in codes and NOT_FOUND in codes:
            return TransientError(NOT_FOUND)
        if NO_SPACE not in codes:
            return StoreUnavailableError(f"Mooncake refused {sample_id} ({size} bytes, codes {codes}): see its logs")
        room = ""
        if self._admin is not None:
            taken, capacity = (self._admin.gauge(f"master_{what}_bytes") for what in ("allocated", "total_capacity"))
            if not capacity:  # none yet, where a master has just been started again
                return TransientError(OWNER_GONE)
            _check_fits(sample_id, size, capacity)
            room = f", {taken} of {capacity} are taken"
        return CapacityError(
            f"{sample_id} needs {size} bytes{room} and Mooncake found no room: release samples first, or give it more "
            "memory (store.capacity_bytes)"
        )

    def _remember(self, ref: SampleRef) -> None:
        with self._lock:
            self._puts[ref.sample_id] = ref
            self._puts.move_to_end(ref.sample_id)
            if len(self._puts) > MAX_REMEMBERED_PUTS:
                self._puts.popitem(last=False)

    def _exist(self, keys: list[str]) -> list[bool]:
        return self._client.retry(lambda: self._client.exist(keys))

    def _remove(self, keys: list[str]) -> None:
        if keys:
            self._client.retry(lambda: self._client.remove(keys))

    def _remove_matching(self, pattern: str) -> None:
        self._client.retry(lambda: self._client.remove_matching(pattern))

    def _keys(self, ref: SampleRef) -> list[str]:
        return self._names.of(ref, self._transfer.parts(ref.features))


def _check_fits(sample_id: str, size: int, capacity: int) -> None:
    if size > capacity:
        raise CapacityError(
            f"{sample_id} needs {size} bytes, the whole store has {capacity}: it is too small for one sample, raise "
            "store.capacity_bytes"
        )


def _name(ref: SampleRef) -> str:
    return f"{ref.sample_id} generation {ref.generation}"
