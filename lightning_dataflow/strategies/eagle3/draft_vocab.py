"""A reduced draft vocabulary: the target tokens that matter most."""

import hashlib

import torch
from torch import Tensor


def most_frequent(token_counts: Tensor, size: int) -> Tensor:
    """The `size` most frequent tokens of `token_counts` (int64 [V]), ascending; ties go to the lower id."""
    return torch.sort(token_counts, descending=True, stable=True).indices[:size].sort().values


def to_offsets(target_ids: Tensor) -> Tensor:
    """d2t as serving engines read it: target id = draft id + d2t[draft id]."""
    return target_ids - torch.arange(len(target_ids), device=target_ids.device)


def version(target_ids: Tensor) -> str:
    """16 hex digits that tell one vocabulary from another."""
    return hashlib.sha256(to_offsets(target_ids).cpu().numpy().tobytes()).hexdigest()[:16]
