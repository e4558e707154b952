"""Blocks of draft positions and what they may see, for drafts that predict a block of tokens in one pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """M blocks of B positions, ordered by sample and anchor. Offset k of a block stands at position anchor + k.

    Attributes:
        sample: int64 [M], row of the batch.
        anchor: int64 [M], position of offset 0.
        tokens: int64 [M, B + 1], the real tokens from the anchor on; 0 beyond the end of the sample.
        supervised: bool [M, B + 1], the loss mask of these tokens; false beyond the end. A block whose own anchor is not
            supervised stands for none.
    """

    sample: Tensor
    anchor: Tensor
    tokens: Tensor
    supervised: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [M], which blocks count."""
        return self.supervised[:, 0]


def cut_blocks(input_ids: Tensor, loss_mask: Tensor, anchors: Sequence[Tensor], block_size: int) -> Blocks:
    """Blocks at the given anchors.

    Args:
        input_ids, loss_mask: [batch, S].
        anchors: ascending positions of each row.

    Without any anchor there is one unsupervised block at position 0 of the first row, so that every rank runs the draft.
    """
    sample = torch.cat([torch.full_like(positions, row) for row, positions in enumerate(anchors)])
    anchor = torch.cat(list(anchors))
    valid = torch.ones(len(anchor), dtype=torch.bool)
    if not len(anchor):
        sample, anchor, valid = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(1).bool()
    positions = anchor[:, None] + torch.arange(block_size + 1)
    inside = positions < input_ids.shape[1]
    positions = positions.clamp(max=input_ids.shape[1] - 1)
    tokens = input_ids[sample[:, None], positions] * inside
    supervised = (loss_mask[sample[:, None], positions] > 0) & inside & valid[:, None]
    return Blocks(sample=sample, anchor=anchor, tokens=tokens, supervised=supervised)
