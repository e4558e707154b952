"""The DFlash draft network (arXiv 2602.06036): the network that all block drafts share, without a further head."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.blocks.network import BlockDraft

Score = TypeVar("Score")


class DFlashDraft(BlockDraft):
    """The target's frozen head reads the hidden states of the blocks."""

    def forward(
        self,
        aux_hidden_states: Tensor,
        embedding: Tensor,
        blocks: Blocks,
        score: Callable[[Tensor], Score],
        position: Tensor | None = None,
    ) -> Score:
        """Draft every block and score it.

        Everything that touches a parameter happens in here, so that sharding sees one forward pass.

        Args:
            aux_hidden_states: [batch, S, n·H].
            embedding: the target's frozen table [V, H].
            score: called once with the hidden states [M, B, H] after the final norm.
            position: int64 [batch, S] of each token in its sample, for packed rows; by default each row is one sample.
        """
        return score(self.hidden_states(aux_hidden_states, embedding, blocks, position))
