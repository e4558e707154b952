"""A strategy of your own in one file: a linear draft that proposes one token.

Position t sees the target's states of token t and the embedding of token t + 1, and predicts token t + 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dataflow import DraftModule, StrategySpec, register_strategy
from lightning_dataflow.contracts import StepContext
from lightning_dataflow.data import SampleRows
from lightning_dataflow.evaluation import Drafter, Proposal
from lightning_dataflow.strategies.common.sums import ObjectiveSums, Quotient


class OneStepDraft(nn.Module):
    """The draft network."""

    def __init__(self, num_aux_layers: int, hidden_size: int):
        super().__init__()
        self.fc = nn.Linear(num_aux_layers * hidden_size, hidden_size, bias=False)

    def forward(self, aux_hidden_states: Tensor, next_embedding: Tensor) -> Tensor:
        """Hidden states [.., H] that the target's head is applied to."""
        return self.fc(aux_hidden_states) + next_embedding


class OneStepDrafter(Drafter):
    """The draft while it decodes."""

    num_draft_tokens = 1

    def __init__(self, draft: OneStepDraft, embedding: Tensor, head: Tensor):
        self.draft, self.embedding, self.head = draft, embedding, head

    def reset(self) -> None:
        """See Drafter."""

    @torch.no_grad()
    def observe(self, next_tokens: Sequence[int], aux_hidden_states: Tensor) -> None:
        """See Drafter."""
        last = self.draft(aux_hidden_states[-1].float(), self.embedding[next_tokens[-1]].float())
        self.logits = last @ self.head.float().T

    def propose(self, temperature: float, generator: torch.Generator) -> Proposal:
        """See Drafter."""
        if temperature == 0:
            return Proposal([int(self.logits.argmax())])
        probabilities = torch.softmax(self.logits / temperature, -1)
        return Proposal([int(torch.multinomial(probabilities, 1, generator=generator))], probabilities[None])


class OneStepModule(DraftModule):
    """Trains it."""

    strategy_name = "one_step"

    def __init__(self, target: str, **options: Any):
        super().__init__(target, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams["seed"])
            self.draft = OneStepDraft(len(self.layer_ids), self.target_info.hidden_size)

    def collate(self, rows: SampleRows) -> dict[str, Any]:
        """See DraftModule."""
        return rows.stack()

    def objective(self, batch: dict[str, Any], context: StepContext) -> ObjectiveSums:
        """See DraftModule: sums, never means, so that no result depends on how a step is cut into batches."""
        ids, mask = batch["input_ids"], batch["loss_mask"][:, 2:].float()
        aux = batch["aux_hidden_states"][:, :-2].to(self.draft.fc.weight.dtype)
        hidden = self.draft(aux, self.frozen_target.embedding[ids[:, 1:-1]])
        logits = hidden @ self.frozen_target.head.T
        losses = F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 2:], reduction="none")
        right = (logits.argmax(-1) == ids[:, 2:]).float()
        return ObjectiveSums(
            loss=Quotient(numerator=(losses * mask).sum(), denominator=mask.sum()),
            metrics={"accuracy": Quotient(numerator=(right * mask).sum(), denominator=mask.sum())},
        )

    def drafter(self, *, num_draft_tokens: int = 1) -> OneStepDrafter:
        """See DraftModule."""
        draft = OneStepDraft(len(self.layer_ids), self.target_info.hidden_size).to(self.frozen_target.head.device)
        draft.load_state_dict(self.full_draft_state())
        return OneStepDrafter(draft.eval(), self.frozen_target.embedding, self.frozen_target.head)


register_strategy(
    StrategySpec(
        name="one_step",
        module=OneStepModule,
        default_layer_ids=lambda num_layers: (num_layers // 2, num_layers - 1),
        features=("input_ids", "loss_mask", "aux_hidden_states"),
    )
)
