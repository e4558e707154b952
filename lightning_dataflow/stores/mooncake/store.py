"""Features in a Mooncake store: tensors between machines, or between processes of one through shared memory."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from lightning_dataflow.contracts import FeatureHandle, SampleOrigin, SampleRef
from lightning_dataflow.contracts.validation import check_id
from lightning_dataflow.stores.base import (
    FeatureStore,
    IsLive,
    Leases,
    Tensors,
    new_generation,
    new_ref,
    of_another_store,
)
from lightning_dataflow.stores.mooncake.admin import MooncakeAdmin
from lightning_dataflow.stores.mooncake.client import (
    PATIENCE_S,
    MooncakeClient,
    OwnerGoneError,
    TransientError,
)
from lightning_dataflow.stores.mooncake.generations import Generations, check_fits, refusal
from lightning_dataflow.stores.mooncake.transfer import read, stage

MAX_REMEMBERED_PUTS = 1 << 14


class MooncakeFeatureStore(FeatureStore):
    """One hard-pinned object per tensor: `{store_id}/{sample_id}/g{generation}/{feature}`; the ref holds the shapes.

    `free` removes objects at once, for every process, even if Mooncake still holds a read lease on them (10 s from a
    read). That is sound because `get` checks, *after* its bytes have landed, whether their keys still exist: a generation
    is never used twice, so a key that exists after the read existed all the time, and its memory cannot have been given to
    another object. Reading a sample while it is freed raises a KeyError, and never returns mixed bytes.

    Attempts order across processes; see Generations. Thread-safe. Objects that a crashed writer left incomplete are
    discarded by the master (`--put_start_discard_timeout_sec`).

    Mooncake has no authentication: whoever can reach the master can read and delete everything, so `store.secret_file` is
    refused with this store. Protect the network instead; see docs/mooncake.md. A reader checks sizes and never unpickles,
    so a forged object can spoil data but not run code.

    Args:
        store_id: separates stores that share a Mooncake. All processes of a run use the same, and no other run's: the log
            of a run has a nonce for it.
        master_address: host:port of `mooncake_master`.
        client_address: host:port of a `mooncake_client` on this machine, to go through shared memory; None for a
            direct connection with `protocol`, `rdma_devices` and `local_hostname` (this machine as others see it).
        metrics_address: host:port of the master's metrics; `sweep` with `is_live` needs it, and `health` is exact with it.
        zero_copy: False moves tensors with Mooncake's plain calls, which copy once more; see MooncakeClient.
        retain: `release` keeps the samples, for several epochs over one capture.
        capacity_bytes: how much Mooncake holds, where known, for messages; the limit itself is Mooncake's.
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
        owner_timeout_s: float = PATIENCE_S,
        unavailable_timeout_s: float = PATIENCE_S,
    ):
        self.store_id = check_id(store_id, "store_id")
        self.uri = f"mooncake://{store_id}"
        self.retain, self.capacity_bytes = retain, capacity_bytes
        self._admin = MooncakeAdmin(metrics_address) if metrics_address else None
        self._client = MooncakeClient(
            master_address=master_address,
            client_address=client_address,
            protocol=protocol,
            rdma_devices=rdma_devices,
            local_hostname=local_hostname,
            zero_copy=zero_copy,
            owner_timeout_s=owner_timeout_s,
            unavailable_timeout_s=unavailable_timeout_s,
        )
        self._generations = Generations(self.store_id, self._client, self._admin)
        self._leases = Leases()
        self._puts: dict[str, SampleRef] = {}  # the last put of a sample by this process
        self._lock = threading.Lock()  # while _puts is trimmed

    def put(self, tensors: Mapping[str, torch.Tensor], origin: SampleOrigin) -> SampleRef:
        """Store `tensors`. The older generation goes first, so that its space can be used.

        Raises:
            CapacityError: no room. The samples that this one was to replace are gone.
        """
        draft = new_ref(tensors, origin, self.uri)
        for name in (origin.sample_id, *draft.features):
            check_id(name, "id")
        if not draft.num_bytes:
            raise ValueError(f"{origin.sample_id} has only empty tensors: Mooncake cannot store 0 bytes")
        if self.capacity_bytes is not None:
            check_fits(draft, self.capacity_bytes)
        previous = self._puts.get(origin.sample_id)
        if origin.attempt:
            self._generations.supersede(draft)
        elif previous is not None and previous.origin.attempt == 0:
            self.free(previous)
        ref = self._client.retry(lambda: self._store(draft, tensors))
        self._remember(ref)
        return ref

    def get(self, ref: SampleRef) -> tuple[Tensors, FeatureHandle]:
        """Read a sample. The tensors are private; their memory is reused when nothing references them."""
        (result,) = self.get_many([ref])
        if isinstance(result, KeyError):
            raise result
        return result

    def get_many(self, refs: Sequence[SampleRef]) -> list[tuple[Tensors, FeatureHandle] | KeyError]:
        """Read samples in two round trips: their bytes, and whether they are still valid.

        A window across two passes may hold a sample twice, and of several buffers for one key in one request Mooncake fills
        the last alone, without an error: then each sample is read by itself.
        """
        if len({(ref.uri, _name(ref)) for ref in refs}) < len(refs):
            return [result for ref in refs for result in self.get_many([ref])]
        ours = [ref for ref in refs if ref.uri == self.uri]
        results = iter(self._get_ours(ours) if ours else [])
        return [next(results) if ref.uri == self.uri else of_another_store(ref, self.uri) for ref in refs]

    def release(self, handle: FeatureHandle) -> None:
        self.release_many([handle])

    def release_many(self, handles: Sequence[FeatureHandle]) -> None:
        """End leases in one round trip. They are counted in this process: the last one frees the sample for all."""
        last = [ref for handle in handles if (ref := self._leases.end(handle)) is not None]
        if not self.retain:
            self._generations.remove(last)

    def free(self, ref: SampleRef) -> None:
        """Free one generation, even with `retain`."""
        if ref.uri == self.uri:
            self._generations.remove([ref])

    def abort(self, sample_id: str) -> None:
        """Free every generation of a sample. The master scans all its keys: about 1 ms for a thousand."""
        check_id(sample_id, "sample_id")
        self._puts.pop(sample_id, None)
        self._generations.remove_sample(sample_id)

    def exists(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Which of `refs` a `get` would find now, in one round trip."""
        ours = [ref for ref in refs if ref.uri == self.uri]
        valid = iter(self._client.retry(lambda: self._generations.are_valid(ours)) if ours else [])
        return [ref.uri == self.uri and next(valid) for ref in refs]

    def health(self) -> dict[str, int]:
        """Counts.

        With `metrics_address`, `num_bytes` and `capacity_bytes` are those of the whole Mooncake, which other stores may
        share, and `num_samples` (this store's generations) lists all keys. Without, the counts are of what this process
        put lately and still exists, and the capacity is the constructor's argument.
        """
        if self._admin is None:
            refs = list(self._puts.values())
            present = [ref.num_bytes for ref, exists in zip(refs, self.exists(refs), strict=True) if exists]
            return {"num_samples": len(present), "num_bytes": sum(present), "capacity_bytes": self.capacity_bytes or 0}
        return {
            "num_samples": self._generations.num_valid(self._admin.list_keys()),
            "num_bytes": self._admin.gauge("master_allocated_bytes"),
            "capacity_bytes": self._admin.gauge("master_total_capacity_bytes"),
        }

    def sweep(self, is_live: IsLive | None = None) -> dict[str, int]:
        """Remove orphans. The master discards incomplete objects itself, so without `is_live` nothing is done.

        Only the master's HTTP port lists keys: without `metrics_address` orphans stay until `clear`.
        """
        if is_live is None or self._admin is None:
            return {}
        return {"orphans": self._generations.remove_orphans(self._admin.list_keys(), is_live)}

    def clear(self) -> None:
        """Remove everything under this store_id, for every process: the end of a run."""
        self._puts.clear()
        self._generations.remove_store()

    def stop_waiting(self) -> None:
        """From now on calls raise StoreUnavailableError at once where Mooncake is gone."""
        self._client.stop_waiting()

    def close(self) -> None:
        """Disconnect. Tensors that were read stay valid."""
        self._client.close()

    def _store(self, draft: SampleRef, tensors: Mapping[str, torch.Tensor]) -> SampleRef:
        """Try once, under a new generation.

        To a put on an existing key Mooncake answers 0 and stores nothing, so after a failure a second put under the same
        keys would leave unknown content.
        """
        staged = stage(self._client, draft, tensors)
        ref = replace(draft, generation=new_generation(draft.origin.attempt))
        keys = self._generations.objects(ref)
        try:
            codes = self._client.put(keys, staged.addresses, staged.sizes)
        except TransientError:
            with suppress(TransientError):
                self._client.remove(keys)
            raise
        if any(codes):
            self._client.remove(keys)  # a batch is not atomic: some may have been stored
            raise refusal(ref, codes, self._admin)
        return ref

    def _get_ours(self, refs: Sequence[SampleRef]) -> list[tuple[Tensors, FeatureHandle] | KeyError]:
        try:
            results = self._client.retry(lambda: self._read(refs))
        except OwnerGoneError as error:
            if len(refs) > 1:  # the owners of the others may live
                return [result for ref in refs for result in self._get_ours([ref])]
            return [KeyError(f"{_name(refs[0])} is lost: {error}")]
        return [
            result if isinstance(result, KeyError) else (result, self._leases.grant(ref))
            for ref, result in zip(refs, results, strict=True)
        ]

    def _read(self, refs: Sequence[SampleRef]) -> list[Tensors | KeyError]:
        results = read(self._client, [self._generations.objects(ref) for ref in refs], refs)
        valid = self._generations.are_valid(refs)  # after the bytes have landed; see the class
        return [
            result if is_valid or isinstance(result, KeyError) else KeyError(f"{_name(ref)} was freed or superseded")
            for ref, result, is_valid in zip(refs, results, valid, strict=True)
        ]

    def _remember(self, ref: SampleRef) -> None:
        with self._lock:
            self._puts.pop(ref.sample_id, None)
            self._puts[ref.sample_id] = ref
            if len(self._puts) > MAX_REMEMBERED_PUTS:
                del self._puts[next(iter(self._puts))]


def _name(ref: SampleRef) -> str:
    return f"{ref.sample_id} generation {ref.generation}"
