"""Blocks of tokens, drafted in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dataflow.evaluation.loop import Drafter, Proposal, check_num_draft_tokens
from lightning_dataflow.strategies.blocks.network import BlockDraft
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget


class BlockDrafter(Drafter):
    """Drafts a block in one pass over the keys and values of verified tokens. If fewer tokens are
    asked for than a block has, the block is shorter, as in serving engines.

    Args:
        draft: unsharded, in evaluation.
        target: lends its embedding and head.
        num_draft_tokens: K, of the tokens that a block drafts.

    Raises:
        UserError: a block has fewer than K.
    """

    def __init__(self, draft: BlockDraft, target: FrozenTarget, *, num_draft_tokens: int = 15):
        check_num_draft_tokens(num_draft_tokens, draft.config.block_size, first=draft.config.first_offset)
        self.draft = draft
        self.target = target
        self.num_draft_tokens = num_draft_tokens
        self.reset()

    def reset(self) -> None:
        self.caches = self.draft.new_caches()

    def observe(self, next_tokens: Sequence[int], aux_hidden_states: Tensor) -> None:
        self.draft.extend_context(aux_hidden_states, self.caches)
        self.anchor = next_tokens[-1]

    @torch.no_grad()
    def propose(self, temperature: float, generator: torch.Generator) -> Proposal:
        first = self.draft.config.first_offset
        hidden = self.draft.decode(self.anchor, self.target.embedding, self.caches, first + self.num_draft_tokens)[first:]
        logits = (hidden.to(self.target.head.dtype) @ self.target.head.T).float()
        return self._choose(hidden, logits, temperature, generator)

    def _choose(self, hidden: Tensor, logits: Tensor, temperature: float, generator: torch.Generator) -> Proposal:
        """Tokens from d [K, H] and the head's products [K, V], each independent of the others."""
        if self.target.transform is not None:
            logits = self.target.transform.apply_(logits)
        if temperature == 0:
            return Proposal(logits.argmax(-1).tolist())
        probabilities = torch.softmax(logits / temperature, -1)
        tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
        return Proposal(tokens.tolist(), probabilities)
