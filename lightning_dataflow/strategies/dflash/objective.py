"""DFlash's training objective (arXiv 2602.06036): cross-entropy of drafted blocks through the target's frozen head, decayed
along the block, or weighted by D-PACE (arXiv 2605.18810)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dataflow.contracts import StepContext
from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.blocks.labels import BlockLabels
from lightning_dataflow.strategies.common.gradients import with_gradients
from lightning_dataflow.strategies.common.sums import ObjectiveSums, Quotient
from lightning_dataflow.strategies.common.tiles import LogitTile, TileBuffer, compute_dtype, sum_dtype, tiles
from lightning_dataflow.targets.logits import LogitsTransform


@dataclass(frozen=True, kw_only=True)
class DFlashObjective:
    """Options of the objective.

    Attributes:
        gamma: the weight of offset k is exp(−(k − 1)/γ), and the loss the weighted mean.
        dpace: weigh offsets by D-PACE instead; the loss is then per sample that has a block.
        dpace_alpha: α, how far a probability is lifted towards 1 before it is multiplied along the block.
    """

    gamma: float = 7.0
    dpace: bool = False
    dpace_alpha: float = 0.5

    def __call__(
        self,
        hidden: Tensor,
        head: Tensor,
        blocks: Blocks,
        context: StepContext | None = None,
        rows: Tensor | None = None,
        transform: LogitsTransform | None = None,
    ) -> ObjectiveSums:
        """Score blocks.

        Args:
            hidden: of the draft after its final norm, [M, B, H].
            head: the target's frozen head [V, H].
            context: not needed here.
            rows: see BlockLabels.
            transform: what the target does to the products of its head.

        Metrics: `accuracy`, `accuracy_per_position` (a vector over the B − 1 drafted tokens), `acceptance_length`.
        """
        labels = BlockLabels.of(blocks, rows=rows)
        row_hidden = hidden.flatten(0, 1).index_select(0, labels.rows)
        cross_entropy, correct = frozen_head_cross_entropy(row_hidden, head, labels.row_labels, transform)
        if self.dpace:
            weight = dpace_weights(labels, cross_entropy.detach(), self.dpace_alpha)
            denominator = num_samples(blocks)
        else:
            weight = labels.decay(self.gamma)
            denominator = weight.sum()
        loss = Quotient(numerator=(weight * cross_entropy).sum(), denominator=denominator)
        return ObjectiveSums(loss=loss, metrics=labels.metrics(correct))


def dpace_weights(labels: BlockLabels, cross_entropy: Tensor, alpha: float) -> Tensor:
    """D-PACE's weights of the supervised offsets [R], from their cross-entropy [R].

    With q = e^{−CE}, s = (1 − α)q + α (1 where unsupervised) and P the running product of s along a block, the weight of
    offset k is Σ_{j ≥ k} P_j over supervised j.
    """
    probability = (1 - alpha) * torch.exp(-cross_entropy) + alpha
    product = torch.where(labels.supervised, labels.spread(probability), 1).cumprod(1) * labels.supervised
    return product.flip(1).cumsum(1).flip(1).flatten()[labels.rows]


def num_samples(blocks: Blocks) -> Tensor:
    """How many samples have a block, a float32 scalar."""
    counts = torch.zeros(len(blocks.row) + 1, dtype=torch.float32, device=blocks.row.device)
    changes = (blocks.row.diff() != 0) | (blocks.start.diff() != 0)
    index = torch.cat((changes.new_zeros(1), changes)).cumsum(0)
    return (counts.index_add(0, index, blocks.valid.float()) > 0).sum().float()


def frozen_head_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, transform: LogitsTransform | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy [R] of rows [R, H] through a frozen head, in tiles, and whether the argmax is the label."""
    cross_entropy, correct, grad = _score_tiles(hidden, head, labels, transform)
    return with_gradients(cross_entropy, [hidden], [grad]), correct


@torch.no_grad()
def _score_tiles(
    hidden: Tensor, head: Tensor, labels: Tensor, transform: LogitsTransform | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    states, head = hidden.to(dtype), head.to(dtype)
    cross_entropy = torch.empty(len(labels), dtype=sum_dtype(states), device=hidden.device)
    correct = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
    grad, buffer = torch.empty_like(states), TileBuffer()
    with torch.autocast(hidden.device.type, enabled=False):
        for tile in tiles(len(labels)):
            scored = LogitTile(buffer.product(states[tile], head.T), labels[tile], transform)
            cross_entropy[tile], correct[tile] = scored.cross_entropy, scored.correct
            scored.subtract_label()
            torch.mm(scored.probabilities.to(dtype), head, out=grad[tile])
    return cross_entropy, correct, grad
