"""A strategy of your own in one file: a linear draft that proposes one token.

Position t sees the target's states of token t and the embedding of token t + 1, and predicts token t + 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dataflow import DraftModule, StrategySpec, register_strategy
from lightning_dataflow.contracts import StepContext
from lightning_dataflow.data import SampleRows
from lightning_dataflow.evaluation import Drafter, Proposal
from lightning_dataflow.strategies.common.sums import ObjectiveSums, Quotient
from lightning_dataflow.strategies.published.contract import DraftDescription, DraftExport
from lightning_dataflow.strategies.published.engines import Engine
from lightning_dataflow.strategies.published.fields import Fields


@dataclass(frozen=True, kw_only=True)
class OneStepConfig:
    """Sizes of the draft."""

    num_aux_layers: int
    hidden_size: int
    vocab_size: int


class OneStepDraft(nn.Module):
    """The draft network."""

    def __init__(self, config: OneStepConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.num_aux_layers * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, aux_hidden_states: Tensor, next_embedding: Tensor) -> Tensor:
        """Hidden states [.., H] that the target's head is applied to."""
        return self.fc(aux_hidden_states) + next_embedding


class OneStepDrafter(Drafter):
    """The draft while it decodes."""

    num_draft_tokens = 1

    def __init__(self, draft: OneStepDraft, embedding: Tensor, head: Tensor):
        self.draft, self.embedding, self.head = draft, embedding, head

    def reset(self) -> None:
        """It keeps nothing of the sequence."""

    @torch.no_grad()
    def observe(self, next_tokens: Sequence[int], aux_hidden_states: Tensor) -> None:
        last = self.draft(aux_hidden_states[-1].float(), self.embedding[next_tokens[-1]].float())
        self.logits = last @ self.head.float().T

    def propose(self, temperature: float, generator: torch.Generator) -> Proposal:
        if temperature == 0:
            return Proposal([int(self.logits.argmax())])
        probabilities = torch.softmax(self.logits / temperature, -1)
        return Proposal([int(torch.multinomial(probabilities, 1, generator=generator))], probabilities[None])


class OneStepModule(DraftModule):
    """Trains it."""

    strategy_name = "one_step"
    num_draft_tokens = 1
    draft: OneStepDraft

    def __init__(self, target: str, **options: Any):
        super().__init__(target, **options)
        info = self.target_info
        sizes = {"hidden_size": info.hidden_size, "vocab_size": info.vocab_size}
        self.draft = self.new_draft(OneStepDraft, OneStepConfig(num_aux_layers=len(self.layer_ids), **sizes))

    def collate(self, rows: SampleRows) -> dict[str, Any]:
        return rows.stack(self.features)

    def objective(self, batch: dict[str, Any], context: StepContext) -> ObjectiveSums:
        """Sums, never means, so that no result depends on how a step is cut into batches."""
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
        draft = self.unsharded(OneStepDraft(self.draft.config))
        return OneStepDrafter(draft, self.frozen_target.embedding, self.frozen_target.head)


class OneStepExport(DraftExport):
    """The folder that an SGLang with a class `OneStepDraftModel` of your own would read."""

    served_as: ClassVar[Mapping[str, str]] = {"sglang": "ONE_STEP"}
    architectures = ("OneStepDraftModel",)

    def fields(self, draft: DraftDescription, engine: Engine) -> dict[str, Any]:
        return {
            "architectures": [self.architectures[0]],
            "hidden_size": draft.network.hidden_size,
            "vocab_size": draft.network.vocab_size,
            "target_layer_ids": engine.to_engine_ids(draft.layer_ids),
        }

    def read(self, fields: Fields, engine: Engine) -> tuple[dict[str, Any], tuple[int, ...] | None]:
        return {}, fields.layer_ids("target_layer_ids", engine.layer_offset)


register_strategy(
    StrategySpec(
        name="one_step",
        title="OneStep",
        module=OneStepModule,
        default_layer_ids=lambda num_layers: (num_layers // 2, num_layers - 2),
        features=lambda settings: ("input_ids", "loss_mask", "aux_hidden_states"),
        export=OneStepExport(),
    )
)
