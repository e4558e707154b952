"""EAGLE3 written down as in the paper: dense masks, all logits at once. The yardstick of benchmarks/objectives.py."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dataflow.strategies.common.layers import rotary_tables, rotate
from lightning_dataflow.strategies.eagle3.network import Eagle3Draft


def shift_left(x: Tensor, by: int) -> Tensor:
    """Shift along dimension 1, zeros from the right."""
    return torch.cat((x[:, by:], torch.zeros_like(x[:, :by])), dim=1)


def dense_attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Scores and probabilities of shape [B, heads, S, (k + 1)·S] in memory, key and value heads repeated."""
    groups = query.shape[1] // keys[0].shape[1]
    key = torch.cat(keys, 2).repeat_interleave(groups, 1)
    value = torch.cat(values, 2).repeat_interleave(groups, 1)
    length = query.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    own = torch.eye(length, dtype=torch.bool, device=query.device)
    visible = torch.cat([causal] + [own] * (len(keys) - 1), dim=1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ value


def naive_eagle3(
    draft: Eagle3Draft,
    input_ids: Tensor,
    aux_hidden_states: Tensor,
    last_hidden_state: Tensor,
    loss_mask: Tensor,
    embedding: Tensor,
    target_head: Tensor,
    num_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and accuracy and acceptance rate per step, with the draft's own weights."""
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    ids, mask = shift_left(input_ids, 1), shift_left(loss_mask, 2)
    target_logits = shift_left(last_hidden_state, 1) @ target_head.T
    target_argmax, target_ids = target_logits.argmax(-1), draft.target_ids
    p = torch.softmax(target_logits[..., target_ids], -1)
    p_full = torch.softmax(target_logits, -1)[..., target_ids]
    supervised = mask * draft.t2d[target_argmax]
    normaliser = mask.sum()
    hidden = draft.fc(aux_hidden_states)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    loss, accuracies, acceptances = torch.zeros(()), [], []
    for step in range(num_steps):
        normed = torch.cat((layer.input_layernorm(F.embedding(ids, embedding)), layer.hidden_norm(hidden)), -1)
        query = attention.split_heads(attention.q_proj(normed))
        key = attention.split_heads(attention.k_proj(normed))
        value = attention.split_heads(attention.v_proj(normed))
        cos, sin = rotary_tables(torch.arange(ids.shape[1]) + step, draft.config)
        keys.append(rotate(key, cos, sin))
        values.append(value)
        hidden = hidden + attention.output(dense_attention(rotate(query, cos, sin), keys, values))
        normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
        hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        logits = draft.lm_head(draft.norm(hidden))
        log_q = torch.log_softmax(logits, -1)
        loss = loss - 0.8**step * ((p * log_q).sum(-1) * supervised).sum() / normaliser
        with torch.no_grad():
            correct = (target_ids[logits.argmax(-1)] == target_argmax) * mask
            accepted = torch.minimum(p_full, log_q.exp()).sum(-1) * supervised
            accuracies.append(correct.sum() / mask.sum())
            acceptances.append(accepted.sum() / supervised.sum())
        ids, p, p_full = shift_left(ids, 1), shift_left(p, 1), shift_left(p_full, 1)
        target_argmax, mask, supervised = shift_left(target_argmax, 1), shift_left(mask, 1), shift_left(supervised, 1)
    return loss, torch.stack(accuracies), torch.stack(acceptances)
