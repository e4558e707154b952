"""How the tensors of a sample become Mooncake objects and back."""

import ctypes
import itertools
import math
from collections.abc import Mapping, Sequence

import torch

from lightning_dataflow.contracts import FeatureSpec, SampleRef
from lightning_dataflow.contracts.validation import DTYPE_BYTES
from lightning_dataflow.stores.base import Tensors
from lightning_dataflow.stores.mooncake.buffers import offsets
from lightning_dataflow.stores.mooncake.client import LEASE_EXPIRED, MooncakeClient

READ_ATTEMPTS = 3
LARGE_BYTES = 256 << 20
"""A ref that claims more is compared with what is stored before memory is taken for it: one more round trip."""


def stored_features(ref: SampleRef) -> list[FeatureSpec]:
    """The features that have an object. Mooncake stores none for 0 bytes, and the ref says all about an empty tensor."""
    return [spec for spec in ref.features.values() if math.prod(spec.shape)]


class Staged:
    """Features of one sample in one pooled buffer, which goes back to the pool when no view of it is referenced.

    Attributes:
        addresses, sizes: of each feature that has an object.
    """

    def __init__(self, client: MooncakeClient, ref: SampleRef):
        self._ref, specs = ref, stored_features(ref)
        self.sizes = [math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in specs]
        starts, total = offsets(self.sizes)
        self._starts = dict(zip((spec.name for spec in specs), starts, strict=True))
        self._buffer = client.lease(total)
        self.addresses = [ctypes.addressof(self._buffer) + start for start in starts]

    def views(self) -> Tensors:
        """Tensors over the buffer, which keep it."""
        return {name: self._view(spec) for name, spec in self._ref.features.items()}

    def _view(self, spec: FeatureSpec) -> torch.Tensor:
        dtype = getattr(torch, spec.dtype)
        if spec.name not in self._starts:
            return torch.empty(spec.shape, dtype=dtype)
        start, count = self._starts[spec.name], math.prod(spec.shape)
        return torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=start).view(spec.shape)


def stage(client: MooncakeClient, ref: SampleRef, tensors: Mapping[str, torch.Tensor]) -> Staged:
    """Copy `tensors` to where `MooncakeClient.put` can send them from."""
    staged = Staged(client, ref)
    for name, view in staged.views().items():
        view.copy_(tensors[name].detach())
    return staged


def read(client: MooncakeClient, keys: Sequence[Sequence[str]], refs: Sequence[SampleRef]) -> list[Tensors | KeyError]:
    """Private tensors of each ref; a KeyError unless every promised byte arrived. One call for all."""
    wrong = {index: error for index in range(len(refs)) if (error := _wrong_size(client, keys[index], refs[index]))}
    if wrong:
        left = [index for index in range(len(refs)) if index not in wrong]
        others = iter(read(client, [keys[index] for index in left], [refs[index] for index in left]) if left else [])
        return [wrong[index] if index in wrong else next(others) for index in range(len(refs))]
    buffers = [Staged(client, ref) for ref in refs]
    addresses = [address for staged in buffers for address in staged.addresses]
    sizes = [size for staged in buffers for size in staged.sizes]
    for _ in range(READ_ATTEMPTS):  # a transfer that outlasts the master's read lease may have to be repeated
        codes = client.get(list(itertools.chain(*keys)), addresses, sizes)
        if LEASE_EXPIRED not in codes:
            break
    remaining = iter(codes)
    results: list[Tensors | KeyError] = []
    for ref, staged in zip(refs, buffers, strict=True):
        received = list(itertools.islice(remaining, len(staged.sizes)))
        missing = KeyError(f"{ref.sample_id} generation {ref.generation} is not stored completely: codes {received}")
        results.append(staged.views() if received == staged.sizes else missing)
    return results


def _wrong_size(client: MooncakeClient, keys: Sequence[str], ref: SampleRef) -> KeyError | None:
    """Why a large ref cannot be read, if an object of it is missing or of another size."""
    if ref.num_bytes <= LARGE_BYTES:
        return None
    for key, spec in zip(keys, stored_features(ref), strict=True):
        stored, claimed = client.stored_bytes(key), math.prod(spec.shape) * DTYPE_BYTES[spec.dtype]
        if stored != claimed:
            name = f"{ref.sample_id} generation {ref.generation}"
            return KeyError(f"{name} is not stored: {spec.name} has {max(stored, 0)} bytes, the ref says {claimed}")
    return None
