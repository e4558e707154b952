"""The contract of every feature store."""

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch

from lightning_dataflow.contracts import CapacityError, FeatureHandle, FeatureSpec, SampleOrigin, SampleRef
from lightning_dataflow.contracts.records import TargetRepr

TARGET_REPRS: dict[str, TargetRepr] = {"last_hidden_state": "hidden_state"}

Tensors = dict[str, torch.Tensor]

IsLive = Callable[[str, str], bool]
"""(sample_id, generation) → whether a ref to it is still in use."""


class StoreUnavailableError(ConnectionError):
    """The store did not answer in time. The message names the address and the remedy."""


class FeatureStore(ABC):
    """Consume-once storage of feature tensors.

    A ref is valid for one generation. Putting a sample again supersedes the older generation: its refs fail from then
    on. Attempts order: a put of an older attempt than the stored one returns a ref that is already stale. After
    `release` or `abort` returned, no process gets the old bytes again.

    Attributes:
        uri: identifies this instance of the store, and is on each of its refs. Refs of another instance are not in this
            one: `get` raises a KeyError that names both, `exists` is False, and `free` does nothing.
    """

    uri: str

    @abstractmethod
    def put(self, tensors: Mapping[str, torch.Tensor], origin: SampleOrigin) -> SampleRef:
        """Store copies of `tensors` and return their ref.

        Raises:
            ValueError: `tensors` is empty.
            CapacityError: no room; nothing became visible.
        """

    @abstractmethod
    def get(self, ref: SampleRef) -> tuple[Tensors, FeatureHandle]:
        """Read the tensors of `ref`. They stay valid for as long as they are referenced, also after `release`.

        Raises:
            KeyError: missing, freed, of an older generation or another store, or shorter than the ref says.
            PermissionError: the shared secret does not match.
        """

    def get_many(self, refs: Sequence[SampleRef]) -> list[tuple[Tensors, FeatureHandle] | KeyError]:
        """`get` for each; a KeyError takes the place of what cannot be read. One round trip where the store can."""
        results: list[tuple[Tensors, FeatureHandle] | KeyError] = []
        for ref in refs:
            try:
                results.append(self.get(ref))
            except KeyError as error:
                results.append(error)
        return results

    def release_many(self, handles: Sequence[FeatureHandle]) -> None:
        """`release` for each. One round trip where the store can."""
        for handle in handles:
            self.release(handle)

    @abstractmethod
    def release(self, handle: FeatureHandle) -> None:
        """End the read lease that a `get` of this process returned.

        The last release of the current generation frees it. A handle of an older generation, one that was released
        before, or one whose lease token this process was not given does nothing.
        """

    @abstractmethod
    def free(self, ref: SampleRef) -> None:
        """Free this one generation at once, for every reader; other generations stay. Freed refs do nothing."""

    @abstractmethod
    def abort(self, sample_id: str) -> None:
        """Free every generation of a sample at once, for every reader. Unknown ids do nothing."""

    @abstractmethod
    def exists(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Which of `refs` a `get` would find now."""

    @abstractmethod
    def health(self) -> dict[str, int]:
        """Counts: `num_samples`, `num_bytes`, `capacity_bytes` (0 when unlimited)."""

    @abstractmethod
    def sweep(self, is_live: IsLive | None = None) -> dict[str, int]:
        """Remove what crashed writers left incomplete, and every generation that is not live; returns counts by kind.

        Without `is_live`, only what is incomplete is removed.
        """

    def clear(self) -> None:  # noqa: B027
        """Remove everything that is left of a run that has ended, where the store holds nothing else."""

    def stop_waiting(self) -> None:  # noqa: B027
        """Make all calls, running and later ones, stop waiting for a peer to come back: the run is ending."""

    def close(self) -> None:  # noqa: B027
        """Give up connections and buffers. The store is not used afterwards; what is stored stays."""


class Leases:
    """The read leases that this process holds, also of generations that were freed meanwhile. Thread-safe."""

    def __init__(self) -> None:
        self._refs: dict[tuple[str, str], tuple[SampleRef, set[str]]] = {}
        self._lock = threading.Lock()

    def grant(self, ref: SampleRef) -> FeatureHandle:
        """A new lease."""
        handle = FeatureHandle(sample_id=ref.sample_id, generation=ref.generation, lease_token=secrets.token_hex(8))
        with self._lock:
            self._refs.setdefault((ref.sample_id, ref.generation), (ref, set()))[1].add(handle.lease_token)
        return handle

    def end(self, handle: FeatureHandle) -> SampleRef | None:
        """The ref whose last lease this was; None while others hold one, and for a token that was not granted."""
        key = (handle.sample_id, handle.generation)
        with self._lock:
            ref, tokens = self._refs.get(key, (None, set()))
            tokens.discard(handle.lease_token)
            if ref is None or tokens:
                return None
            del self._refs[key]
            return ref


def new_ref(tensors: Mapping[str, torch.Tensor], origin: SampleOrigin, uri: str) -> SampleRef:
    """The ref of a new generation of `tensors`. Raises ValueError when there are none."""
    if not tensors:
        raise ValueError("a sample without tensors cannot be stored: capture returned no features")
    features = {
        name: FeatureSpec(
            name=name,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor.dtype),
            target_repr=TARGET_REPRS.get(name),
        )
        for name, tensor in tensors.items()
    }
    return SampleRef(
        origin=origin,
        uri=uri,
        generation=new_generation(origin.attempt),
        features=features,
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def new_generation(attempt: int) -> str:
    """`attempt-nonce`, never used twice."""
    return f"{attempt}-{secrets.token_hex(8)}"


def attempt_of(generation: str) -> int:
    """The attempt that a generation is of."""
    return int(generation.partition("-")[0])


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def check_room(ref: SampleRef, taken: int, capacity: int | None) -> None:
    """Raise CapacityError when `ref` does not fit beside the `taken` bytes; None is no limit."""
    if capacity is not None and taken + ref.num_bytes > capacity:
        raise CapacityError(
            f"{ref.sample_id} needs {ref.num_bytes} bytes, {taken} of {capacity} are taken: release samples first, or "
            "raise the store's capacity_bytes"
        )


def of_another_store(ref: SampleRef, uri: str) -> KeyError:
    """The error for a ref of another store than `uri`."""
    return KeyError(f"{ref.sample_id} generation {ref.generation} is in {ref.uri}, this store is {uri}")


def check_tensors(tensors: Mapping[str, torch.Tensor], ref: SampleRef) -> None:
    """Raise KeyError when what was read is not what the ref promises."""
    actual = {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()}
    expected = {name: (spec.shape, spec.dtype) for name, spec in ref.features.items()}
    if actual != expected:
        raise KeyError(f"features of {ref.sample_id} are {actual}, the ref says {expected}")
