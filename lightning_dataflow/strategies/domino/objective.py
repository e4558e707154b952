"""Domino's training objective (arXiv 2605.29707): cross-entropy of the corrected logits, and of the base logits with a
share λ that falls to zero."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dataflow.contracts import StepContext
from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.blocks.labels import BlockLabels
from lightning_dataflow.strategies.common.sums import ObjectiveSums, Quotient
from lightning_dataflow.strategies.common.tiles import LogitTile, TileBuffer, compute_dtype, sum_dtype, tiles


@dataclass(frozen=True, kw_only=True)
class DominoObjective:
    """Options of the objective.

    Attributes:
        gamma: see DFlashObjective.
        shift_label: see DominoConfig.
        lambda_start: λ at step 0.
        lambda_decay_ratio: λ falls linearly to 0 over this share of the run's steps.
    """

    gamma: float = 7.0
    shift_label: bool = False
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
    ) -> ObjectiveSums:
        """Score blocks.

        Args:
            hidden, features, weight: d [M, B, H], u [M, B, E] and W [V, E] of the draft.
            head: the target's frozen head [V, H].
            rows: see BlockLabels.

        Metrics: those of DFlashObjective on the corrected logits, the same on the base logits with the prefix `base_`, and
        `final_loss`, `base_loss`, `base_share` (λ).
        """
        labels, share = BlockLabels.of(blocks, shift=self.shift_label, rows=rows), self.base_share(context)
        row_weight = labels.decay(self.gamma)
        row_hidden, row_features = (x.flatten(0, 1).index_select(0, labels.rows) for x in (hidden, features))
        total, *scores = _CorrectedCrossEntropy.apply(
            row_hidden, row_features, weight, head, labels.row_labels, row_weight, share
        )
        final, base, final_correct, base_correct = scores
        denominator = row_weight.sum()
        metrics = {
            "final_loss": Quotient(numerator=(row_weight * final).sum(), denominator=denominator),
            "base_loss": Quotient(numerator=(row_weight * base).sum(), denominator=denominator),
            "base_share": Quotient(numerator=share * denominator, denominator=denominator),
        }
        metrics |= labels.metrics(final_correct) | labels.metrics(base_correct, "base_")
        return ObjectiveSums(loss=Quotient(numerator=total, denominator=denominator), metrics=metrics)


class _Grads(NamedTuple):
    hidden: Tensor
    features: Tensor
    weight: Tensor


class _CorrectedCrossEntropy(torch.autograd.Function):
    """Σ w·((1 − λ)·CE(base + u·Wᵀ) + λ·CE(base)) over rows, base logits through a frozen head.

    In tiles, each with one product for the base logits and one for the gradient of d; all gradients come from the same
    pass. Also returns both cross-entropies and whether either argmax is right, [R] each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        features: Tensor,
        weight: Tensor,
        head: Tensor,
        labels: Tensor,
        row_weight: Tensor,
        share: float,
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(hidden)
        inputs = (hidden, features, weight)
        states, head = [x.detach().to(dtype) for x in inputs], head.to(dtype)
        grads = _Grads(*(torch.zeros_like(x, dtype=sum_dtype(x)) for x in inputs)) if any(ctx.needs_input_grad) else None
        losses = torch.empty(2, len(labels), dtype=sum_dtype(states[0]), device=hidden.device)
        correct = torch.empty(2, len(labels), dtype=torch.bool, device=hidden.device)
        buffers = TileBuffer(), TileBuffer()
        with torch.autocast(hidden.device.type, enabled=False):
            for tile in tiles(len(labels)):
                d, u, w = states[0][tile], states[1][tile], states[2]
                base_logits = buffers[0].product(d, head.T)
                final = LogitTile(buffers[1].product(u, w.T).add_(base_logits), labels[tile])
                base = LogitTile(base_logits, labels[tile])
                losses[0, tile], losses[1, tile] = final.cross_entropy, base.cross_entropy
                correct[0, tile], correct[1, tile] = final.correct, base.correct
                if grads is not None:
                    _add_gradients(grads, tile, final, base, u, w, head, row_weight[tile, None], share)
        ctx.grads, ctx.dtypes = grads, [x.dtype for x in inputs]
        total = (row_weight * torch.lerp(losses[0], losses[1], share)).sum()
        outputs = *losses.unbind(), *correct.unbind()
        ctx.mark_non_differentiable(*outputs)
        return total, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            [None] * 3
            if ctx.grads is None
            else [(x * grad).to(dtype) for x, dtype in zip(ctx.grads, ctx.dtypes, strict=True)]
        )
        return *grads, None, None, None, None


def _add_gradients(
    grads: _Grads,
    tile: slice,
    final: LogitTile,
    base: LogitTile,
    features: Tensor,
    weight: Tensor,
    head: Tensor,
    row_weight: Tensor,
    share: float,
) -> None:
    final.subtract_label()
    base.subtract_label()
    both = torch.lerp(final.probabilities, base.probabilities, share, out=base.probabilities)
    grads.hidden[tile] = (both.to(head.dtype) @ head) * row_weight
    of_final, final_weight = final.probabilities.to(weight.dtype), (1 - share) * row_weight
    grads.features[tile] = (of_final @ weight) * final_weight
    weighted = (features * final_weight).to(weight.dtype)
    if grads.weight.dtype == weight.dtype:
        grads.weight.addmm_(of_final.T, weighted)
    else:
        grads.weight.add_(of_final.T @ weighted)
