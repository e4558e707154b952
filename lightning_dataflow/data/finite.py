"""Finds NaN and infinity in tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dataflow.stores.finite import is_finite


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity. Of a sharded tensor, only this rank's part is checked."""
    local = {name: getattr(tensor, "_local_tensor", tensor).detach() for name, tensor in tensors.items()}
    checks = {name: is_finite(tensor) for name, tensor in local.items() if tensor.is_floating_point() and tensor.numel()}
    if not checks:
        return None
    finite = torch.stack(list(checks.values())).tolist()  # the only wait for the device
    return next((name for name, is_finite in zip(checks, finite, strict=True) if not is_finite), None)


def broken_features(tensors: Mapping[str, Tensor], source_id: str, sample_id: str) -> str | None:
    """The error message if features of a sample hold NaN or infinity; None otherwise."""
    name = first_not_finite(tensors)
    if name is None:
        return None
    return (
        f"{name} of sample {source_id} ({sample_id}) holds NaN or infinity: check the target's weights, and whether its "
        "dtype (target.dtype) is wide enough, then capture again"
    )
