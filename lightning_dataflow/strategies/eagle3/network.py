"""The EAGLE3 draft network (arXiv 2503.01840). Weight names are the serving engines'."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.common.cache import DraftCache
from lightning_dataflow.strategies.common.layers import Attention, DecoderLayer, RMSNorm, SwiGLU, rotary_tables, rotate
from lightning_dataflow.strategies.eagle3.attention import PackedRows, causal_attention, unrolled_attention
from lightning_dataflow.strategies.eagle3.draft_vocab import to_offsets

Score = TypeVar("Score")
Weights = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """Sizes of an EAGLE3 draft.

    Attributes:
        num_aux_layers: how many of the target's layers are concatenated as input.
        vocab_size, draft_vocab_size: V of the target and V_d of the draft.
        rope_scaling: see `read_rope`.
        train_embeddings: hold the token embedding as a parameter; otherwise the target's frozen one is lent.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    num_aux_layers: int = 3
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    train_embeddings: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise UserError(
                f"draft_vocab_size={self.draft_vocab_size}: the target's vocabulary has {self.vocab_size} tokens, choose 1 "
                f"to {self.vocab_size} (or leave it out for all of them)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: choose sizes that divide"
            )


class Eagle3Attention(Attention):
    """Attention whose input is [RMSNorm(embedding) ; RMSNorm(h)], 2H wide."""

    def halves(self) -> tuple[Weights, Weights]:
        """Weights of q, k, v for the embedding half and for the hidden half of the input. Sliced once a forward pass:
        every slice of a parameter costs a gradient of the parameter's size."""
        embedding, hidden = zip(
            *(module.weight.chunk(2, dim=1) for module in (self.q_proj, self.k_proj, self.v_proj)), strict=True
        )
        return embedding, hidden

    def project(self, x: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        """The share of q, k, v [..., heads · D] that one half of the input has."""
        return tuple(F.linear(x, weight) for weight in weights)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, S, heads · D] → [B, heads, S, D]."""
        return self.heads(x).transpose(1, 2)


class Eagle3Layer(DecoderLayer):
    """The one decoder layer; residuals are on h."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: Eagle3Attention = Eagle3Attention(config, 2 * config.hidden_size)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)


class Eagle3Draft(nn.Module):
    """EAGLE3: `fc` folds n captured layers into h; one layer turns (embedding, h) into the next h.

    Attributes:
        d2t: int64 [V_d], **offsets**: target id = draft id + d2t[draft id].
        t2d: bool [V], whether a target id is in the draft vocabulary. It is the first V_d tokens until `set_target_ids`.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.num_aux_layers * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)
        if config.train_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    @property
    def target_ids(self) -> Tensor:
        """Target id of every draft id, int64 [V_d]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_target_ids(self, target_ids: Tensor) -> None:
        """Reduce the vocabulary to these tokens."""
        self.d2t.copy_(to_offsets(target_ids))
        self.t2d.zero_().index_fill_(0, target_ids.to(self.t2d.device), True)

    def forward(
        self,
        input_ids: Tensor,
        aux_hidden_states: Tensor,
        embedding: Tensor | None,
        num_steps: int,
        score: Callable[[Tensor, Tensor], Score],
        position: Tensor | None = None,
    ) -> Score:
        """Unroll the draft on its own outputs (training-time test) and score every step.

        Everything that touches a parameter happens in here, so that sharding sees one forward pass.

        Args:
            input_ids: [B, S], position t holds the token *after* the one whose features stand at t.
            aux_hidden_states: [B, S, n·H].
            embedding: the target's frozen table [V, H]; None to use the trained one.
            num_steps: K.
            score: called once with the normed hidden states [K, B, S, H] and the head's weight [V_d, H].
            position: int64 [B, S] of each token in its sample, for packed rows; by default each row is one sample.
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        embedded = layer.input_layernorm(self.embed(input_ids, embedding).to(aux_hidden_states.dtype))
        of_embedding, of_hidden = attention.halves()
        # The embedding's share of q, k, v is the same in every step, shifted left by one more each time.
        shares = [F.pad(share, (0, 0, 0, num_steps - 1)) for share in attention.project(embedded, of_embedding)]
        length = input_ids.shape[1]
        rows = None if position is None else PackedRows(position)
        first = torch.arange(length, device=input_ids.device) if position is None else position[:, None]
        hidden = self.fc(aux_hidden_states)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs: list[Tensor] = []
        for step in range(num_steps):
            window = slice(step, step + length)
            query, key, value = (
                attention.split_heads(part + share[:, window])
                for part, share in zip(attention.project(layer.hidden_norm(hidden), of_hidden), shares, strict=True)
            )
            cos, sin = rotary_tables(first + step, self.config)
            keys.append(rotate(key, cos, sin))
            values.append(value)
            attended = unrolled_attention(rotate(query, cos, sin), keys, values, rows)
            hidden = layer.finish(hidden, attended)
            outputs.append(self.norm(hidden))
        return score(torch.stack(outputs), self.lm_head.weight)

    @torch.no_grad()
    def decode(
        self, input_ids: Tensor, hidden: Tensor, embedding: Tensor | None, cache: DraftCache
    ) -> tuple[Tensor, Tensor]:
        """One causal pass over n new positions of one sequence.

        Args:
            input_ids: [1, n].
            hidden: [1, n, H], `fc` of the target's states or this draft's previous h.
            embedding: as in `forward`.
            cache: grows by n positions.

        Returns h [1, n, H] and the logits [V_d] of the last position, in float32.
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        embedded = layer.input_layernorm(self.embed(input_ids, embedding).to(hidden.dtype))
        start = cache.length
        positions = torch.arange(start, start + input_ids.shape[1], device=hidden.device)
        cos, sin = rotary_tables(positions, self.config)
        of_embedding, of_hidden = attention.halves()
        shares = attention.project(embedded, of_embedding), attention.project(layer.hidden_norm(hidden), of_hidden)
        query, key, value = (attention.split_heads(first + second) for first, second in zip(*shares, strict=True))
        keys, values = cache.append(rotate(key, cos, sin), value)
        hidden = layer.finish(hidden, causal_attention(rotate(query, cos, sin), keys, values))
        return hidden, self.lm_head(self.norm(hidden[:, -1])).float().squeeze(0)

    def embed(self, input_ids: Tensor, embedding: Tensor | None) -> Tensor:
        """[B, S] → [B, S, H], from the trained table if there is one."""
        if self.config.train_embeddings:
            return self.embed_tokens(input_ids)
        assert embedding is not None, "frozen embeddings come from the target"
        return F.embedding(input_ids, embedding)
