"""Domino's training objective (arXiv 2605.29707): cross-entropy of the corrected logits, and of the base logits with a
share λ that falls to zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dataflow.contracts import StepContext
from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.blocks.labels import BlockLabels
from lightning_dataflow.strategies.common.gradients import with_gradients
from lightning_dataflow.strategies.common.sums import ObjectiveSums, Quotient
from lightning_dataflow.strategies.common.tiles import LogitTile, TileBuffer, add_product, compute_dtype, sum_dtype, tiles
from lightning_dataflow.targets.logits import LogitsTransform


@dataclass(frozen=True, kw_only=True)
class DominoObjective:
    """Options of the objective.

    Attributes:
        gamma: see DFlashObjective.
        first_offset: see BlockConfig.
        lambda_start: λ at step 0.
        lambda_decay_ratio: λ falls linearly to 0 over this share of the run's steps.
    """

    gamma: float = 7.0
    first_offset: int = 1
    lambda_start: float = 1.0
    lambda_decay_ratio: float = 0.5

    def base_share(self, context: StepContext) -> float:
        """λ at an optimizer step; 0 in a run without an end."""
        if context.total_steps is None:
            return 0.0
        progress = context.global_step / max(1, int(context.total_steps * self.lambda_decay_ratio))
        return min(max(self.lambda_start * (1 - min(progress, 1)), 0.0), 1.0)

    def __call__(
        self,
        hidden: Tensor,
        features: Tensor,
        weight: Tensor,
        head: Tensor,
        blocks: Blocks,
        context: StepContext,
        rows: Tensor | None = None,
        transform: LogitsTransform | None = None,
    ) -> ObjectiveSums:
        """Score blocks.

        Args:
            hidden, features, weight: d [M, B, H], u [M, B, E] and W [V, E] of the draft.
            head: the target's frozen head [V, H].
            rows: see BlockLabels.
            transform: what the target does to the products of its head; it follows the correction.

        Metrics: those of DFlashObjective on the corrected logits, the same on the base logits with the prefix `base_`, and
        `final_loss`, `base_loss`, `base_share` (λ).
        """
        labels, share = BlockLabels.of(blocks, first=self.first_offset, rows=rows), self.base_share(context)
        row_weight = labels.decay(self.gamma)
        row_hidden, row_features = (x.flatten(0, 1).index_select(0, labels.rows) for x in (hidden, features))
        inputs = row_hidden, row_features, weight
        scores = _score_tiles(inputs, head, labels.row_labels, row_weight, share, transform)
        total = with_gradients((row_weight * torch.lerp(scores.final, scores.base, share)).sum(), inputs, scores.grads)
        denominator = row_weight.sum()
        metrics = {
            "final_loss": Quotient(numerator=(row_weight * scores.final).sum(), denominator=denominator),
            "base_loss": Quotient(numerator=(row_weight * scores.base).sum(), denominator=denominator),
            "base_share": Quotient(numerator=share * denominator, denominator=denominator),
        }
        metrics |= labels.metrics(scores.final_correct) | labels.metrics(scores.base_correct, "base_")
        return ObjectiveSums(loss=Quotient(numerator=total, denominator=denominator), metrics=metrics)


class _Scores(NamedTuple):
    """Cross-entropies [R] of final and base logits, whether either argmax is the label, and the loss's gradients."""

    final: Tensor
    base: Tensor
    final_correct: Tensor
    base_correct: Tensor
    grads: list[Tensor]


@torch.no_grad()
def _score_tiles(
    inputs: Sequence[Tensor],
    head: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    share: float,
    transform: LogitsTransform | None,
) -> _Scores:
    """Score rows of d [R, H] and u [R, E], with W [V, E]. Each tile takes one product for the base logits and one for the
    gradient of d."""
    dtype = compute_dtype(inputs[0])
    (hidden, features, weight), head = (x.to(dtype) for x in inputs), head.to(dtype)
    grads = [torch.zeros_like(x, dtype=sum_dtype(x)) for x in inputs]
    losses = torch.empty(2, len(labels), dtype=sum_dtype(hidden), device=hidden.device)
    correct = torch.empty(2, len(labels), dtype=torch.bool, device=hidden.device)
    buffers = TileBuffer(), TileBuffer()
    with torch.autocast(hidden.device.type, enabled=False):
        for tile in tiles(len(labels)):
            base_logits = buffers[0].product(hidden[tile], head.T)
            corrected = buffers[1].product(features[tile], weight.T).add_(base_logits)
            final = LogitTile(corrected, labels[tile], transform)
            base = LogitTile(base_logits, labels[tile], transform)
            losses[0, tile], losses[1, tile] = final.cross_entropy, base.cross_entropy
            correct[0, tile], correct[1, tile] = final.correct, base.correct
            final.subtract_label()
            base.subtract_label()
            both = torch.lerp(final.probabilities, base.probabilities, share, out=base.probabilities)
            grads[0][tile] = (both.to(dtype) @ head) * row_weight[tile, None]
            of_final, final_weight = final.probabilities.to(dtype), (1 - share) * row_weight[tile, None]
            grads[1][tile] = (of_final @ weight) * final_weight
            add_product(grads[2], of_final.T, (features[tile] * final_weight).to(dtype))
    return _Scores(losses[0], losses[1], correct[0], correct[1], grads)
