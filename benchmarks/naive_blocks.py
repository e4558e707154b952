"""DFlash and Domino written down as in their papers: dense masks, all logits at once. The yardstick of objectives.py."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dataflow.strategies.blocks.network import BlockDraft
from lightning_dataflow.strategies.common.layers import RMSNorm, rotary_tables, rotate
from lightning_dataflow.strategies.domino.network import DominoDraft


def norm(x: Tensor, layer: RMSNorm) -> Tensor:
    return layer.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.eps)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Scores of shape [batch, heads, N·B, S + N·B] in memory, key and value heads repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(scores.masked_fill(~visible[:, None], float("-inf")), -1) @ value


def block_mask(anchors: Tensor, length: int, block_size: int) -> Tensor:
    """bool [batch, N·B, S + N·B] from anchors [batch, N]."""
    anchor = anchors.repeat_interleave(block_size, 1)
    block = torch.arange(anchors.shape[1]).repeat_interleave(block_size)
    context = torch.arange(length) < anchor[..., None]
    return torch.cat((context, (block[:, None] == block).expand(len(anchors), -1, -1)), dim=2)


def hidden_states(draft: BlockDraft, tokens: Tensor, aux: Tensor, embedding: Tensor, anchors: Tensor) -> Tensor:
    """d [batch, N·B, H]; tokens [batch, N, B]."""
    batch, _, block_size = tokens.shape
    length = aux.shape[1]
    context = norm(draft.fc(aux), draft.hidden_norm)
    noise = torch.full_like(tokens, draft.config.mask_token_id)
    noise[..., 0] = tokens[..., 0]
    hidden = F.embedding(noise.view(batch, -1), embedding)
    visible = block_mask(anchors, length, block_size)
    own = (anchors[..., None] + torch.arange(block_size)).view(batch, -1)
    positions = torch.cat((torch.arange(length).expand(batch, -1), own), dim=1)
    cos, sin = (table[:, None] for table in rotary_tables(positions, draft.config))
    for layer in draft.layers:
        attention, x = layer.self_attn, norm(hidden, layer.input_layernorm)
        both = torch.cat((context, x), dim=1)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, draft.config.head_dim)).transpose(1, 2)

        query = rotate(norm(heads(attention.q_proj(x)), attention.q_norm), cos[:, :, length:], sin[:, :, length:])
        key = rotate(norm(heads(attention.k_proj(both)), attention.k_norm), cos, sin)
        hidden = hidden + attention.output(dense_attention(query, key, heads(attention.v_proj(both)), visible))
        normed, mlp = norm(hidden, layer.post_attention_layernorm), layer.mlp
        hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return norm(hidden, draft.norm)


def blocks_of(input_ids: Tensor, loss_mask: Tensor, anchors: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Real tokens and decayed weights [batch, N, B]; offset 0 and what lies beyond the end weigh nothing."""
    positions = anchors[..., None] + torch.arange(block_size)
    inside = positions < input_ids.shape[1]
    positions = positions.clamp(max=input_ids.shape[1] - 1).flatten(1)
    tokens = input_ids.gather(1, positions).view(inside.shape)
    supervised = loss_mask.gather(1, positions).view(inside.shape) * inside
    offset = torch.arange(block_size)
    return tokens, supervised * (offset > 0) * torch.exp(-(offset - 1) / 7.0)


def weighted_loss(logits: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    accuracy = (logits.argmax(-1).flatten() == tokens.flatten()) & (weight.flatten() > 0)
    assert accuracy.sum() >= 0  # measured, as ours
    return (loss * weight.flatten()).sum() / weight.sum()


def naive_dflash(
    draft: BlockDraft, input_ids: Tensor, aux: Tensor, loss_mask: Tensor, anchors: Tensor, embedding: Tensor, head: Tensor
) -> Tensor:
    """Loss, with the draft's own weights."""
    tokens, weight = blocks_of(input_ids, loss_mask, anchors, draft.config.block_size)
    return weighted_loss(hidden_states(draft, tokens, aux, embedding, anchors) @ head.T, tokens, weight)


def naive_domino(
    draft: DominoDraft,
    input_ids: Tensor,
    aux: Tensor,
    loss_mask: Tensor,
    anchors: Tensor,
    embedding: Tensor,
    head: Tensor,
    share: float,
) -> Tensor:
    """Loss with λ = share, with the draft's own weights; labels not shifted, every drafted token corrected."""
    tokens, weight = blocks_of(input_ids, loss_mask, anchors, draft.config.block_size)
    hidden = hidden_states(draft, tokens, aux, embedding, anchors)
    states, _ = draft.prefix_gru(F.embedding(tokens.flatten(0, 1)[:, :-1], embedding))
    states = F.pad(states, (0, 0, 1, 0)).reshape(*hidden.shape[:2], -1)
    base = hidden @ head.T
    corrected = (torch.arange(draft.config.block_size) > 0).repeat(anchors.shape[1])[:, None]
    final = base + draft.embed_proj(torch.cat((hidden, states), -1)) * corrected
    return (1 - share) * weighted_loss(final, tokens, weight) + share * weighted_loss(base, tokens, weight)
