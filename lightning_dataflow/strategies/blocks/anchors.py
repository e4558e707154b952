"""The random draw of anchors. It depends on seed, prompt and pass alone: not on batch, rank or topology."""

import hashlib

import torch
from torch import Tensor

from lightning_dataflow.data.collate import Sample


def draw_anchors(sample: Sample, num_anchors: int, seed: int) -> Tensor:
    """Up to `num_anchors` positions, ascending, int64; drawn without replacement among those whose own and next token are
    supervised."""
    supervised = sample.tensors["loss_mask"] > 0
    candidates = (supervised[:-1] & supervised[1:]).nonzero().squeeze(-1)
    generator = torch.Generator().manual_seed(_seed_of_draw(sample, seed))
    chosen = torch.randperm(len(candidates), generator=generator)[:num_anchors]
    return candidates[chosen].sort().values


def _seed_of_draw(sample: Sample, seed: int) -> int:
    name = f"{seed} {sample.pass_index} {sample.source_id}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big", signed=True)
