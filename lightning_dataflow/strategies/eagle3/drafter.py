"""Chains of K tokens from an EAGLE3 draft."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dataflow.evaluation.loop import Drafter, Proposal
from lightning_dataflow.strategies.eagle3.network import DraftCache, Eagle3Draft


class ChainDrafter(Drafter):
    """Drafts one token after the other. The cache keeps verified positions only, computed from the target's states.

    Args:
        draft: unsharded, in evaluation.
        embedding: the target's table [V, H]; None when the draft trained its own.
        num_draft_tokens: K.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor | None, *, num_draft_tokens: int = 4):
        self.draft = draft
        self.embedding = embedding
        self.num_draft_tokens = num_draft_tokens
        self.target_ids = draft.target_ids
        self.reset()

    def reset(self) -> None:
        self.cache = DraftCache()

    @torch.no_grad()
    def observe(self, next_tokens: Sequence[int], aux_hidden_states: Tensor) -> None:
        """Position t pairs the state of token t with the embedding of token t + 1."""
        weight = self.draft.fc.weight
        hidden = self.draft.fc(aux_hidden_states.to(weight.device, weight.dtype)).unsqueeze(0)
        self.hidden, self.logits = self._pass(next_tokens, hidden)

    @torch.no_grad()
    def propose(self, temperature: float, generator: torch.Generator) -> Proposal:
        verified = self.cache.length
        hidden, logits = self.hidden, self.logits
        tokens: list[int] = []
        distributions: list[Tensor] = []
        for index in range(self.num_draft_tokens):
            if index:
                hidden, logits = self._pass(tokens[-1:], hidden)
            draft_id = self._choose(logits, temperature, generator, distributions)
            tokens.append(int(self.target_ids[draft_id]))
        self.cache.crop(verified)
        return Proposal(tokens, torch.stack(distributions) if distributions else None)

    def _pass(self, tokens: Sequence[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """h [1, 1, H] and logits [V_d] of the last of `tokens`."""
        ids = torch.tensor([list(tokens)], device=hidden.device)
        hidden, logits = self.draft.decode(ids, hidden, self.embedding, self.cache)
        return hidden[:, -1:], logits

    def _choose(self, logits: Tensor, temperature: float, generator: torch.Generator, distributions: list[Tensor]) -> int:
        if temperature == 0:
            return int(logits.argmax())
        reduced = torch.softmax(logits / temperature, -1)
        full = torch.zeros(self.draft.config.vocab_size, device=logits.device)
        distributions.append(full.index_copy_(0, self.target_ids, reduced))
        return int(torch.multinomial(reduced, 1, generator=generator))
