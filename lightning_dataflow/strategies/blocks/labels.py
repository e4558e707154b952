"""What drafted blocks are trained on and measured by: labels, supervision, decay, accuracy and acceptance length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.common.sums import Quotient


@dataclass(frozen=True, kw_only=True)
class BlockLabels:
    """Labels of M blocks of B offsets.

    Attributes:
        first: the first offset with a label. 1 when the label at offset k is token k of the block (offset 0 is the anchor),
            0 when it is token k + 1.
        labels: int64 [M, B].
        supervised: bool [M, B].
        rows: int64 [R], the supervised offsets of the flattened [M·B].
        valid: bool [M], the blocks that count.
    """

    first: int
    labels: Tensor
    supervised: Tensor
    rows: Tensor
    valid: Tensor

    @classmethod
    def of(cls, blocks: Blocks, *, first: int = 1, rows: Tensor | None = None) -> "BlockLabels":
        """Labels of `blocks`; `rows` are computed here unless they are given, which saves a device synchronisation."""
        block_size = blocks.tokens.shape[1] - 1
        supervised = blocks.supervised.narrow(1, 1 - first, block_size).clone()
        supervised[:, :first] = False
        if rows is None:
            rows = supervised.flatten().nonzero().squeeze(-1)
        return cls(
            first=first,
            labels=blocks.tokens.narrow(1, 1 - first, block_size),
            supervised=supervised,
            rows=rows,
            valid=blocks.valid,
        )

    @property
    def row_labels(self) -> Tensor:
        """Labels of the supervised offsets, [R]."""
        return self.labels.flatten()[self.rows]

    def decay(self, gamma: float) -> Tensor:
        """exp(−n/γ) of every supervised offset, n counted from the first offset with a label; float32 [R]."""
        offset = self.rows % self.labels.shape[1] - self.first
        return torch.exp(-offset.float() / gamma)

    def spread(self, values: Tensor) -> Tensor:
        """Values [R] of the supervised offsets → [M, B], 0 elsewhere."""
        return values.new_zeros(self.labels.numel()).index_copy(0, self.rows, values).view_as(self.labels)

    def metrics(self, correct: Tensor, prefix: str = "") -> dict[str, Quotient]:
        """Accuracy, accuracy by position of the drafted token, and acceptance length.

        `correct` bool [R] says which supervised offsets are right.

        The acceptance length of a block is 1 + its supervised offsets that are right before the first wrong one;
        unsupervised ones are skipped. The mean is over valid blocks.
        """
        right = self.spread(correct.float())
        supervised = self.supervised.float()
        run = torch.where(self.supervised, right, 1).cumprod(1) * supervised
        valid = self.valid.float()
        return {
            f"{prefix}accuracy": Quotient(numerator=right.sum(), denominator=supervised.sum()),
            f"{prefix}accuracy_per_position": Quotient(
                numerator=right[:, self.first :].sum(0), denominator=supervised[:, self.first :].sum(0)
            ),
            f"{prefix}acceptance_length": Quotient(numerator=((1 + run.sum(1)) * valid).sum(), denominator=valid.sum()),
        }
