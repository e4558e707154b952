"""The Domino draft network (arXiv 2605.29707): DFlash, and a correction of its logits by the tokens before each offset."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.blocks.network import BlockConfig, BlockDraft


@dataclass(frozen=True, kw_only=True)
class DominoConfig(BlockConfig):
    """Sizes of a Domino draft.

    Attributes:
        gru_hidden_dim: G, the state that sums up a block's tokens so far.
        emb_dim: E, rank of the correction.
        shift_label: the label at offset k is token k + 1 of the block, instead of token k.
        pure_draft_prefix_len: drafted tokens at the start of a block that are not corrected; SGLang serves 1 only.
    """

    gru_hidden_dim: int = 512
    emb_dim: int = 256
    shift_label: bool = False
    pure_draft_prefix_len: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.gru_hidden_dim, self.emb_dim) < 1:
            raise UserError(f"gru_hidden_dim={self.gru_hidden_dim}, emb_dim={self.emb_dim}: sizes are at least 1")
        if not 0 <= self.pure_draft_prefix_len < self.block_size - 1 + self.shift_label:
            raise UserError(
                f"pure_draft_prefix_len={self.pure_draft_prefix_len}: a block of {self.block_size} needs drafted tokens "
                f"left to correct, choose 0 to {self.block_size - 2 + self.shift_label}"
            )

    @property
    def first_offset(self) -> int:
        return 0 if self.shift_label else 1

    @property
    def suffix_start(self) -> int:
        """First offset whose logits are corrected."""
        return self.pure_draft_prefix_len + self.first_offset


class DominoDraft(BlockDraft):
    """DFlash with `prefix_gru`, which reads the real previous tokens of a block, and the low-rank `embed_proj`."""

    config: DominoConfig

    def __init__(self, config: DominoConfig):
        super().__init__(config)
        self.prefix_gru = nn.GRU(config.hidden_size, config.gru_hidden_dim, bias=False, batch_first=True)
        self.embed_proj = nn.Sequential(
            nn.Linear(config.hidden_size + config.gru_hidden_dim, config.emb_dim, bias=False),
            nn.SiLU(),
            nn.Linear(config.emb_dim, config.vocab_size, bias=False),
        )
        nn.init.zeros_(self.correction_weight)  # a new draft starts as DFlash

    def head(self, hidden: Tensor, blocks: Blocks, embedding: Tensor) -> tuple[Tensor, ...]:
        """u [M, B, E] and W [V, E]: the correction of the logits is u · Wᵀ, with u = 0 where an offset is not corrected."""
        features = self.correction_features(hidden, self.prefix_states(blocks.tokens, embedding))
        corrected = torch.arange(self.config.block_size, device=hidden.device) >= self.config.suffix_start
        return features * corrected[:, None], self.correction_weight

    @property
    def correction_weight(self) -> Tensor:
        """W [V, E]."""
        return cast(nn.Linear, self.embed_proj[2]).weight

    def prefix_states(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """g [M, B, G] from the blocks' real tokens [M, B + 1]: the state after the tokens before each label."""
        first = self.config.first_offset
        states, _ = self._run_gru(tokens[:, : self.config.block_size - first], embedding, None)
        return F.pad(states, (0, 0, first, 0))

    def _run_gru(self, tokens: Tensor, embedding: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """States [M, L, G] after each of the tokens [M, L], and the last one; from `state`, zeros by default."""
        embedded = F.embedding(tokens, embedding).to(self.fc.weight.dtype)
        # On CUDA, autocast runs a GRU in float16 whatever dtype it is set to, and float16 overflows.
        with torch.autocast(embedded.device.type, enabled=False):
            return self.prefix_gru(embedded, state)

    def correction_features(self, hidden: Tensor, states: Tensor) -> Tensor:
        """u [..., E] from d [..., H] and g [..., G]."""
        return self.embed_proj[1](self.embed_proj[0](torch.cat((hidden, states.to(hidden.dtype)), dim=-1)))

    @torch.no_grad()
    def decode_correction(
        self, index: int, hidden: Tensor, token: int, embedding: Tensor, state: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """What is added to the logits [V] of drafted token `index`, counted from 0; None for nothing.

        Args:
            hidden: d [H] of its offset.
            token: the token before it.
            state: of the GRU before `token`; None at the anchor.

        Returns the correction and the GRU's new state.
        """
        output, state = self._run_gru(torch.tensor([[token]], device=embedding.device), embedding, state)
        if index < self.config.pure_draft_prefix_len:
            return None, state
        return F.linear(self.correction_features(hidden, output[0, 0]), self.correction_weight), state
