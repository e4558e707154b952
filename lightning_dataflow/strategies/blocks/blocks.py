"""Blocks of draft positions and what they may see, for drafts that predict a block of tokens in one pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A sample: positions [start, stop) of a row."""

    row: int
    start: int
    stop: int


class Blocks(NamedTuple):
    """M blocks of B positions, ordered by sample and anchor. Offset k of a block stands at position anchor + k of its row.

    Attributes:
        row: int64 [M], row of the batch.
        start: int64 [M], position where the block's sample starts in the row.
        anchor: int64 [M], position of offset 0.
        tokens: int64 [M, B + 1], the real tokens from the anchor on; 0 beyond the end of the sample.
        supervised: bool [M, B + 1], the loss mask of these tokens; false beyond the end. A block does not
            count if its own anchor is not supervised.
    """

    row: Tensor
    start: Tensor
    anchor: Tensor
    tokens: Tensor
    supervised: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [M], which blocks count."""
        return self.supervised[:, 0]


def cut_blocks(
    input_ids: Tensor,
    loss_mask: Tensor,
    anchors: Sequence[Tensor],
    block_size: int,
    samples: Sequence[Span] | None = None,
) -> Blocks:
    """Blocks at the given anchors.

    Args:
        input_ids, loss_mask: [batch, S].
        anchors: ascending positions in each sample, int64.
        samples: the samples of the rows; by default each row is one sample.

    Without any anchor there is one unsupervised block at position 0 of the first row, so that every rank runs the draft.
    """
    samples = samples or [Span(row, 0, input_ids.shape[1]) for row in range(len(input_ids))]
    counts = torch.tensor([len(positions) for positions in anchors])
    spans, valid = torch.tensor(samples).repeat_interleave(counts, dim=0), True
    anchor = torch.cat(list(anchors))
    if not len(anchor):
        spans, anchor, valid = torch.tensor([[0, 0, input_ids.shape[1]]]), torch.zeros(1, dtype=torch.int64), False
    row, start, stop = spans.unbind(1)
    anchor = start + anchor
    positions = anchor[:, None] + torch.arange(block_size + 1)
    inside = positions < stop[:, None]
    positions = positions.clamp(max=input_ids.shape[1] - 1)
    tokens = input_ids[row[:, None], positions] * inside
    supervised = (loss_mask[row[:, None], positions] > 0) & inside & valid
    return Blocks(row=row, start=start, anchor=anchor, tokens=tokens, supervised=supervised)
