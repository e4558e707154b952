"""The contract of every feature store."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch

from lightning_dataflow.contracts import FeatureHandle, FeatureSpec, SampleOrigin, SampleRef
from lightning_dataflow.contracts.records import TargetRepr

TARGET_REPRS: dict[str, TargetRepr] = {"last_hidden_state": "hidden_state"}

Tensors = dict[str, torch.Tensor]

IsLive = Callable[[str, str], bool]
"""(sample_id, generation) → whether somebody still holds a ref to it."""


class FeatureStore(ABC):
    """Consume-once storage of feature tensors.

    A ref is valid for one generation. Putting a sample again supersedes the older generation: its refs fail from then
    on. Attempts order: a put of an older attempt than the one that is there returns a ref that is stale at once. After
    `release` or `abort` returned, nobody is handed the old bytes again.

    Attributes:
        uri: names this instance of the store, and is on each of its refs. The ref of another instance finds nothing here:
            `get` names both, `exists` is False, and `free` does nothing.
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
        """Read the tensors of `ref`. They stay valid for as long as somebody references them, also after `release`.

        Raises:
            KeyError: missing, freed, of an older generation or another store, or shorter than the ref says.
            PermissionError: the shared secret no longer matches.
        """

    def get_many(self, refs: Sequence[SampleRef]) -> list[tuple[Tensors, FeatureHandle] | KeyError]:
        """`get` for each; a KeyError stands where it would have been raised. One round trip where the store can."""
        found: list[tuple[Tensors, FeatureHandle] | KeyError] = []
        for ref in refs:
            try:
                found.append(self.get(ref))
            except KeyError as error:
                found.append(error)
        return found

    def release_many(self, handles: Sequence[FeatureHandle]) -> None:
        """`release` for each. One round trip where the store can."""
        for handle in handles:
            self.release(handle)

    @abstractmethod
    def release(self, handle: FeatureHandle) -> None:
        """Give up the read lease; the last release of the current generation frees it. Stale handles do nothing."""

    @abstractmethod
    def free(self, ref: SampleRef) -> None:
        """Free this one generation at once, for every reader; another generation stays. Freed refs do nothing."""

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
        """Remove what crashed writers left half-written, and every generation that is not live; returns counts by kind.

        Without `is_live` only the half-written is removed.
        """

    def clear(self) -> None:  # noqa: B027
        """The run has ended: remove all that is left of it, where the store holds nothing else."""

    def stop_waiting(self) -> None:  # noqa: B027
        """The run is being ended: calls, those that wait already among them, no longer wait for a peer to come back."""

    def close(self) -> None:  # noqa: B027
        """Give up connections and buffers. The store is not used afterwards; what is stored stays."""

    def _elsewhere(self, ref: SampleRef) -> KeyError:
        """The error of a `get` whose ref another store has made."""
        return KeyError(f"{ref.sample_id} generation {ref.generation} is in {ref.uri}, this store is {self.uri}")


def feature_specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, FeatureSpec]:
    """Describe `tensors`; raises ValueError when there are none."""
    if not tensors:
        raise ValueError("a sample without tensors cannot be stored: capture returned no features")
    return {
        name: FeatureSpec(
            name=name,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor.dtype),
            target_repr=TARGET_REPRS.get(name),
        )
        for name, tensor in tensors.items()
    }


def new_generation(attempt: int) -> str:
    """`attempt-nonce`, never used twice."""
    return f"{attempt}-{secrets.token_hex(8)}"


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Payload of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_tensors(tensors: Mapping[str, torch.Tensor], ref: SampleRef) -> None:
    """Raise KeyError when what was read is not what the ref promises."""
    found = {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()}
    expected = {name: (spec.shape, spec.dtype) for name, spec in ref.features.items()}
    if found != expected:
        raise KeyError(f"features of {ref.sample_id} are {found}, the ref says {expected}")
