"""Attention of EAGLE3's unrolled steps (training-time test, arXiv 2503.01840).

At unroll step k, the query at position t sees the keys of step 0 at positions ≤ t and, of every later step 1..k, the key
at its own position t. So a step is causal attention over S keys plus k more keys per query, never an [S, (k+1)·S] matrix.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_dataflow.strategies.common.flex import flex, flex_mask

Parts = Sequence[tuple[slice, ...]]
"""Indices of what attends to itself in [B, heads, S, ...]; () for everything."""


class PackedRows:
    """Where samples stand in packed rows.

    Args:
        position: int64 [B, S] of each token in its sample; a sample begins where it is 0.
    """

    def __init__(self, position: Tensor):
        self.position = position

    @cached_property
    def sample(self) -> Tensor:
        """int64 [B, S], which of its row's samples each token belongs to."""
        return (self.position == 0).cumsum(-1)

    @cached_property
    def parts(self) -> list[tuple[slice, slice, slice]]:
        """Index of every sample in [B, heads, S, ...]; for the CPU: a GPU would have to synchronise."""
        starts = [row.nonzero().squeeze(-1).tolist() for row in self.position == 0]
        length = self.position.shape[1]
        return [
            (slice(row, row + 1), slice(None), slice(start, stop))
            for row, firsts in enumerate(starts)
            for start, stop in zip(firsts, [*firsts[1:], length], strict=True)
        ]


def unrolled_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: PackedRows | None = None
) -> Tensor:
    """Attention of unroll step k = len(keys) − 1.

    Args:
        query: [B, heads, S, D].
        keys, values: one [B, kv_heads, S, D] per step 0..k, rotated; heads is a multiple of kv_heads.
        rows: samples, which do not see each other; by default each row is one sample.

    Returns [B, heads, S, D].
    """
    if query.device.type == "cpu":
        return _FlashUnrolledAttention.apply(query, [()] if rows is None else rows.parts, *keys, *values)
    return _flex_unrolled_attention(query, keys, values, rows)


class _FlashUnrolledAttention(torch.autograd.Function):
    """Flash attention over step 0, merged with the own-position keys by log-sum-exp.

    The flash backward recomputes its probabilities as exp(score − lse) and its correction from output · grad: handed the
    *merged* output and log-sum-exp, it yields the exact gradients of the merged softmax for the keys of step 0.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, parts: Parts, *keys_values: Tensor) -> Tensor:
        num_steps = len(keys_values) // 2
        keys, values = keys_values[:num_steps], keys_values[num_steps:]
        scale = query.shape[-1] ** -0.5
        out, lse = _causal_flash(query, keys[0], values[0], scale, parts)
        if num_steps > 1:
            scores = [_own_scores(query, key, scale) for key in keys[1:]]
            merged = torch.logsumexp(torch.stack([lse, *scores]), dim=0)
            total = out * (lse - merged).exp().unsqueeze(-1)
            for score, value in zip(scores, values[1:], strict=True):
                share = _grouped((score - merged).exp(), value).unsqueeze(-1)
                _grouped(total, value).addcmul_(share, value.unsqueeze(2).to(share.dtype))
            out, lse = total.to(query.dtype), merged
        ctx.save_for_backward(query, out, lse, *keys_values)
        ctx.scale, ctx.parts = scale, parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse, *keys_values = ctx.saved_tensors
        num_steps = len(keys_values) // 2
        keys, values = keys_values[:num_steps], keys_values[num_steps:]
        grad_query, grad_key, grad_value = _causal_flash_backward(
            grad, query, keys[0], values[0], out, lse, ctx.scale, ctx.parts
        )
        grad_keys, grad_values = [grad_key], [grad_value]
        correction = _precise(grad * out).sum(-1)
        for key, value in zip(keys[1:], values[1:], strict=True):
            probability = (_own_scores(query, key, ctx.scale) - lse).exp_()
            grad_score = (_own_scores(grad, value, 1.0) - correction).mul_(probability).mul_(ctx.scale)
            # Round to the dtype of the inputs before multiplying with them, as the flash kernel does.
            probability, grad_score = (_grouped(x.to(query.dtype), key).unsqueeze(-1) for x in (probability, grad_score))
            grad_values.append((probability * _grouped(grad, value)).sum(2))
            grad_keys.append((grad_score * _grouped(query, key)).sum(2))
            _grouped(grad_query, key).addcmul_(grad_score, key.unsqueeze(2))
        return grad_query, None, *grad_keys, *grad_values


def _causal_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, parts: Parts) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [B, heads, S] of causal attention within each of the parts."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_precise(query[:0]).dtype)
    for part in parts:
        out[part], lse[part] = attend(query[part], key[part], value[part], 0.0, True, scale=scale)
    return out, lse


def _causal_flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, parts: Parts
) -> tuple[Tensor, Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for part in parts:
        of_part = attend(*(x[part] for x in (grad, query, key, value, out)), lse[part].contiguous(), 0.0, True, scale=scale)
        for grad_of_all, grad_of_part in zip(grads, of_part, strict=True):
            grad_of_all[part] = grad_of_part
    return grads


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """[B, heads, ...] → [B, kv_heads, heads per kv_head, ...], a view."""
    return x.unflatten(1, (like.shape[1], -1))


def _own_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Products of every query with the key at its own position: [B, heads, S], in float32 at least."""
    return torch.linalg.vecdot(_precise(_grouped(query, key)), _precise(key.unsqueeze(2))).flatten(1, 2).mul_(scale)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _flex_unrolled_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: PackedRows | None = None
) -> Tensor:
    """The same with flex attention, whose block mask skips the empty part of [S, (k+1)·S]."""
    if rows is None:
        mask = _unrolled_block_mask(query.shape[2], len(keys), query.device)
    else:
        mask = _packed_block_mask(rows.sample, len(keys))
    return flex(query, torch.cat(tuple(keys), 2), torch.cat(tuple(values), 2), mask)


@lru_cache(maxsize=64)
def _unrolled_block_mask(length: int, num_steps: int, device: torch.device) -> Any:
    def visible(row: Tensor, head: Tensor, position: Tensor, key: Tensor) -> Tensor:
        return torch.where(key < length, key <= position, key % length == position)

    return flex_mask(visible, None, length, num_steps * length, device)


def _packed_block_mask(sample: Tensor, num_steps: int) -> Any:
    batch, length = sample.shape

    def visible(row: Tensor, head: Tensor, position: Tensor, key: Tensor) -> Tensor:
        own_sample = sample[row, position] == sample[row, key % length]
        return torch.where(key < length, (key <= position) & own_sample, key % length == position)

    return flex_mask(visible, batch, length, num_steps * length, sample.device)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last n of m positions, for decoding: query [B, heads, n, D], key and value [B, kv_heads, m, D]."""
    new, total = query.shape[2], key.shape[2]
    if new == 1:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
