"""How the tensors of a sample become Mooncake objects and back."""

import ctypes
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from lightning_dataflow.contracts import FeatureSpec, SampleRef
from lightning_dataflow.stores.base import Tensors, check_tensors
from lightning_dataflow.stores.mooncake.buffers import BufferPool, offsets
from lightning_dataflow.stores.mooncake.client import LEASE_EXPIRED, MooncakeClient

READ_ATTEMPTS = 3


class Transfer(ABC):
    """Moves samples under keys that the store chooses."""

    @abstractmethod
    def parts(self, features: Mapping[str, FeatureSpec]) -> list[str]:
        """Names of the objects of a sample with `features`, in the order of the keys of `write` and `read`."""

    @abstractmethod
    def stage(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Copy `tensors` to where `write` can send them from, as often as it takes."""

    @abstractmethod
    def write(self, keys: Sequence[str], staged: Any) -> list[int]:
        """Store what was staged; a code for each key, 0 for stored."""

    @abstractmethod
    def read(self, wanted: Sequence[tuple[Sequence[str], SampleRef]]) -> list[Tensors | KeyError]:
        """Private tensors of each (keys, ref); a KeyError unless every byte that the ref promises arrived."""

    @abstractmethod
    def write_marks(self, keys: Sequence[str]) -> list[int]:
        """Store a one-byte object under each key; a code for each, 0 for stored or there already."""

    def close(self) -> None:  # noqa: B027
        """Free what is not in use."""


class TensorTransfer(Transfer):
    """One object per tensor, straight between registered buffers and the store. Empty tensors have no object: Mooncake
    stores none for 0 bytes, and the ref says all about them.
    """

    def __init__(self, client: MooncakeClient, *, max_idle_bytes: int):
        self._client = client
        self._pool = BufferPool(client.memory, max_idle_bytes=max_idle_bytes)

    def parts(self, features: Mapping[str, FeatureSpec]) -> list[str]:
        """See Transfer.parts."""
        return [name for name, spec in features.items() if math.prod(spec.shape)]

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> "_Staged":
        """See Transfer.stage. One buffer for all tensors."""
        staged = _Staged(self._client, self._pool, [t.numel() * t.element_size() for t in tensors.values() if t.numel()])
        for tensor, offset in zip((t for t in tensors.values() if t.numel()), staged.offsets, strict=True):
            staged.view(offset, tuple(tensor.shape), tensor.dtype).copy_(tensor.detach())
        return staged

    def write(self, keys: Sequence[str], staged: "_Staged") -> list[int]:
        """See Transfer.write."""
        return self._client.put(keys, staged.addresses, staged.sizes)

    def read(self, wanted: Sequence[tuple[Sequence[str], SampleRef]]) -> list[Tensors | KeyError]:
        """See Transfer.read. One call for all."""
        buffers = [self._room(ref) for _, ref in wanted]
        keys = [key for names, _ in wanted for key in names]
        addresses = [address for staged in buffers for address in staged.addresses]
        sizes = [size for staged in buffers for size in staged.sizes]
        for _ in range(READ_ATTEMPTS):  # a transfer that outlasts the master's read lease may have to be repeated
            codes = self._client.get(keys, addresses, sizes)
            if LEASE_EXPIRED not in codes:
                break
        remaining = iter(codes)
        return [
            self._tensors(ref, staged, list(itertools.islice(remaining, len(staged.sizes))))
            for (_, ref), staged in zip(wanted, buffers, strict=True)
        ]

    def _room(self, ref: SampleRef) -> "_Staged":
        stored = [ref.features[name] for name in self.parts(ref.features)]
        return _Staged(
            self._client, self._pool, [math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize for spec in stored]
        )

    def _tensors(self, ref: SampleRef, staged: "_Staged", codes: list[int]) -> Tensors | KeyError:
        if codes != staged.sizes:
            return KeyError(f"{ref.sample_id} generation {ref.generation} is not there in full: codes {codes}")
        starts = dict(zip(self.parts(ref.features), staged.offsets, strict=True))
        return {
            name: staged.view(starts[name], spec.shape, getattr(torch, spec.dtype))
            if name in starts
            else torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
            for name, spec in ref.features.items()
        }

    def write_marks(self, keys: Sequence[str]) -> list[int]:
        """See Transfer.write_marks."""
        staged = _Staged(self._client, self._pool, [1])
        return self._client.put(keys, staged.addresses * len(keys), [1] * len(keys))

    def close(self) -> None:
        """See Transfer.close. Tensors that were read stay valid."""
        self._pool.close()


class _Staged:
    """One pooled buffer with aligned parts; back to the pool when neither it nor a view of it is referenced."""

    def __init__(self, client: MooncakeClient, pool: BufferPool, sizes: list[int]):
        self.sizes = sizes
        self.offsets, total = offsets(sizes)
        self._buffer = client.retry(lambda: pool.lease(total))
        base = ctypes.addressof(self._buffer)
        self.addresses = [base + offset for offset in self.offsets]

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over one part, which keeps the buffer."""
        return torch.frombuffer(self._buffer, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


class BlobTransfer(Transfer):
    """One safetensors blob per sample through Mooncake's plain calls, for backends without the raw ones."""

    def __init__(self, client: MooncakeClient):
        self._client = client

    def parts(self, features: Mapping[str, FeatureSpec]) -> list[str]:
        """See Transfer.parts."""
        return ["blob"]

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> bytes:
        """See Transfer.stage."""
        return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def write(self, keys: Sequence[str], staged: bytes) -> list[int]:
        """See Transfer.write."""
        return [self._client.put_bytes(key, staged) for key in keys]

    def read(self, wanted: Sequence[tuple[Sequence[str], SampleRef]]) -> list[Tensors | KeyError]:
        """See Transfer.read."""
        return [self._read(keys[0], ref) for keys, ref in wanted]

    def _read(self, key: str, ref: SampleRef) -> Tensors | KeyError:
        try:
            tensors = safetensors.torch.load(self._client.get_bytes(key))
            check_tensors(tensors, ref)
        except SafetensorError as error:  # no object reads as no bytes
            return KeyError(f"{ref.sample_id} generation {ref.generation} cannot be read: {error}")
        except KeyError as error:
            return error
        return tensors

    def write_marks(self, keys: Sequence[str]) -> list[int]:
        """See Transfer.write_marks."""
        return [self._client.put_bytes(key, b"\0") for key in keys]
