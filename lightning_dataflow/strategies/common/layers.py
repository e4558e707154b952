"""Building blocks of the drafts, in the equations of Llama."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_dataflow.targets.rope import scaled_frequencies


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., hidden]."""
        return self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))


class Attention(nn.Module):
    """The four projections of grouped-query attention, without biases; `input_size` is the width of what q, k, v read."""

    def __init__(self, config: Any, input_size: int):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(input_size, width, bias=False)
        self.k_proj = nn.Linear(input_size, kv_width, bias=False)
        self.v_proj = nn.Linear(input_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[N, L, heads · D] → [N, L, heads, D]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def output(self, x: Tensor) -> Tensor:
        """[N, heads, L, D] → [N, L, H]."""
        return self.o_proj(x.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """What follows attention in a Llama layer."""

    self_attn: Attention
    mlp: SwiGLU
    post_attention_layernorm: RMSNorm

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residual and MLP after attention [N, heads, L, D]; returns the new [N, L, H]."""
        hidden = hidden + self.self_attn.output(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _GatedProduct(torch.autograd.Function):
    """silu(gate) · up; keeps its two inputs only and recomputes silu in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


def rotary_tables(positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., head_dim] of positions [...], in float32, for rotary position embedding (arXiv 2104.09864)
    with halves rotated, as in Llama.

    Frequencies are not a buffer: casting the module to bfloat16 would round them, and so every angle.
    """
    if config.rope_scaling is None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
        frequencies, amplitude = 1.0 / config.rope_theta**exponents, 1.0
    else:
        scaling = tuple(config.rope_scaling.items())
        frequencies, amplitude = scaled_frequencies(config.head_dim, config.rope_theta, scaling, positions.device)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., S, head_dim] by tables [..., S, head_dim] that broadcast."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
