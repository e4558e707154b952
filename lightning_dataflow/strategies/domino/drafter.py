"""Blocks of tokens from a Domino draft."""

import torch
from torch import Tensor

from lightning_dataflow.evaluation.loop import Proposal
from lightning_dataflow.strategies.blocks.drafter import BlockDrafter
from lightning_dataflow.strategies.domino.network import DominoDraft


class DominoDrafter(BlockDrafter):
    """Corrects the logits of each token by the ones drafted before it; see BlockDrafter."""

    draft: DominoDraft

    def _choose(self, hidden: Tensor, logits: Tensor, temperature: float, generator: torch.Generator) -> Proposal:
        tokens: list[int] = []
        probabilities: list[Tensor] = []
        state: Tensor | None = None
        for index in range(self.num_draft_tokens):
            before = tokens[-1] if tokens else self.anchor
            added, state = self.draft.decode_correction(index, hidden[index], before, self.target.embedding, state)
            corrected = logits[index] if added is None else logits[index] + added
            chosen = super()._choose(hidden[index], corrected[None], temperature, generator)
            tokens += chosen.tokens
            if chosen.probabilities is not None:
                probabilities.append(chosen.probabilities)
        return Proposal(tokens, torch.cat(probabilities) if probabilities else None)
