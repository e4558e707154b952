"""The network that block drafts share. Weight names are those of the serving engines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.blocks.attention import ContextKeys, block_attention, decode_attention
from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.common.cache import DraftCache
from lightning_dataflow.strategies.common.layers import Attention, DecoderLayer, RMSNorm, SwiGLU, rotary_tables, rotate

FULL, SLIDING = "full_attention", "sliding_attention"
Score = TypeVar("Score")


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes of a block draft. Hidden size and vocabulary are the target's.

    Attributes:
        num_aux_layers: how many of the target's layers are concatenated as context.
        block_size: B, positions drafted in one pass, the anchor's included.
        mask_token_id: stands for the tokens to be drafted.
        layer_types: `full_attention` or `sliding_attention` for each layer; empty for full attention everywhere.
        sliding_window: positions that a sliding layer sees, the query's own included.
        rope_scaling: see `read_rope`.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    mask_token_id: int
    num_aux_layers: int = 5
    block_size: int = 16
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers={self.num_layers}: a draft needs at least one layer")
        if self.block_size < 2:
            raise UserError(f"block_size={self.block_size}: the anchor and a drafted token make 2, choose 2 or more")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(
                f"mask_token_id={self.mask_token_id}: the target's embedding has {self.vocab_size} rows, choose 0 to "
                f"{self.vocab_size - 1}"
            )
        if self.layer_types and (len(self.layer_types) != self.num_layers or set(self.layer_types) - {FULL, SLIDING}):
            raise UserError(
                f"layer_types={list(self.layer_types)}: name {FULL} or {SLIDING} for each of the {self.num_layers} layers"
            )
        if (SLIDING in self.layer_types) != (self.sliding_window is not None) or (self.sliding_window or 1) < 1:
            raise UserError(
                f"sliding_window={self.sliding_window} with layer_types={list(self.layer_types)}: a window of at least 1 "
                f"goes with {SLIDING} layers, and only with them"
            )

    @property
    def first_offset(self) -> int:
        """Offset that drafts the token after the anchor."""
        return 1

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer; None for full attention."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == SLIDING else None


class BlockAttention(Attention):
    """Queries from the block, keys and values from context and block by the same projections; q and k normed per head."""

    def __init__(self, config: BlockConfig):
        super().__init__(config, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def query(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [N, L, H] → [N, heads, L, D], rotated by tables [..., L, D]."""
        return rotate(self.q_norm(self.heads(self.q_proj(x))).transpose(1, 2), cos, sin)

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, L, H] → key, rotated, and value, [N, kv_heads, L, D] each."""
        key = rotate(self.k_norm(self.heads(self.k_proj(x))).transpose(1, 2), cos, sin)
        return key, self.heads(self.v_proj(x)).transpose(1, 2)


class BlockLayer(DecoderLayer):
    """A Qwen3 decoder layer on the block; the context enters its attention as it is."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: BlockAttention = BlockAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)


class BlockDraft(nn.Module):
    """`fc` folds n captured layers into a context. A few layers turn blocks of mask tokens into hidden states.

    The target's head reads its hidden states; subclasses may add a `head` of their own.
    """

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.num_aux_layers * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def decoder_layers(self) -> list[BlockLayer]:
        """In order."""
        return cast("list[BlockLayer]", list(self.layers))

    def forward(
        self,
        aux_hidden_states: Tensor,
        embedding: Tensor,
        blocks: Blocks,
        score: Callable[..., Score],
        position: Tensor | None = None,
    ) -> Score:
        """Draft every block and score it.

        Everything that touches a parameter happens in here, so that sharding sees one forward pass.

        Args:
            aux_hidden_states: [batch, S, n·H].
            embedding: the target's frozen table [V, H].
            score: called once with the hidden states [M, B, H] after the final norm, and with what `head` returns.
            position: int64 [batch, S] of each token in its sample, for packed rows; by default each row is one sample.
        """
        context = self.context(aux_hidden_states)
        if position is None:
            position = torch.arange(context.shape[1], device=context.device).unsqueeze(0)
        context_tables = [table[:, None] for table in rotary_tables(position, self.config)]
        offsets = torch.arange(self.config.block_size, device=context.device)
        block_position = (blocks.anchor - blocks.start)[:, None] + offsets
        block_tables = [table[:, None] for table in rotary_tables(block_position, self.config)]
        hidden = self.noise(blocks.tokens[:, 0], embedding)
        for index, layer in enumerate(self.decoder_layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            keys = ContextKeys(*attention.key_value(context, *context_tables), *attention.key_value(x, *block_tables))
            attended = block_attention(attention.query(x, *block_tables), keys, blocks, self.config.window(index))
            hidden = layer.finish(hidden, attended)
        hidden = self.norm(hidden)
        return score(hidden, *self.head(hidden, blocks, embedding))

    def head(self, hidden: Tensor, blocks: Blocks, embedding: Tensor) -> tuple[Tensor, ...]:
        """What the draft's own head, if it has one, makes of the hidden states [M, B, H] for the objective."""
        return ()

    def context(self, aux_hidden_states: Tensor) -> Tensor:
        """[..., n·H] → [..., H]."""
        return self.hidden_norm(self.fc(aux_hidden_states.to(self.fc.weight.dtype)))

    def noise(self, anchor_tokens: Tensor, embedding: Tensor) -> Tensor:
        """Embedded blocks [M, B, H]: the real token [M], then mask tokens."""
        ids = anchor_tokens.new_full((len(anchor_tokens), self.config.block_size), self.config.mask_token_id)
        ids[:, 0] = anchor_tokens
        return F.embedding(ids, embedding).to(self.fc.weight.dtype)

    def new_caches(self) -> list[DraftCache]:
        """An empty context, one cache a layer, for decoding."""
        return [DraftCache() for _ in self.layers]

    @torch.no_grad()
    def extend_context(self, aux_hidden_states: Tensor, caches: list[DraftCache]) -> None:
        """Add the states [n, n_layers·H] of n verified tokens of one sequence."""
        context = self.context(aux_hidden_states.to(self.fc.weight.device)).unsqueeze(0)
        start = caches[0].length
        tables = rotary_tables(torch.arange(start, start + context.shape[1], device=context.device), self.config)
        for layer, cache in zip(self.decoder_layers, caches, strict=True):
            cache.append(*layer.self_attn.key_value(context, *tables))

    @torch.no_grad()
    def decode(self, anchor_token: int, embedding: Tensor, caches: list[DraftCache], length: int) -> Tensor:
        """d [length, H] of the block that follows the context, whose offset 0 is `anchor_token`; at most B offsets."""
        start, device = caches[0].length, embedding.device
        tables = rotary_tables(torch.arange(start, start + length, device=device), self.config)
        hidden = self.noise(torch.tensor([anchor_token], device=device), embedding)[:, :length]
        for index, (layer, cache) in enumerate(zip(self.decoder_layers, caches, strict=True)):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            keys, values = cache.append(*attention.key_value(x, *tables))
            cache.crop(start)  # the block is drafted anew once part of it is verified
            attended = decode_attention(attention.query(x, *tables), keys, values, self.config.window(index))
            hidden = layer.finish(hidden, attended)
        return self.norm(hidden).squeeze(0)
