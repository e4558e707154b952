"""From samples of different lengths to the rows of one batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as read from the store.

    Attributes:
        sample_id: unique in the run; it differs between topologies.
        source_id, pass_index: the prompt and the pass over it, the same in every topology. Random draws are keyed by them.
        tensors: their first dimension is the sample's length.
        broken: the error message if they hold NaN or infinity.
    """

    sample_id: str
    source_id: str
    pass_index: int
    num_tokens: int
    tensors: Mapping[str, Tensor]
    broken: str | None = None


class Placed(NamedTuple):
    """A sample and the positions [start, stop) that it takes in a row."""

    sample: Sample
    row: int
    start: int
    stop: int


class SampleRows:
    """The samples of one micro-batch, laid out in rows.

    Args:
        rows: the samples of each row, one after the other; at least one per row.
        row_tokens: S, the length of packed rows; None if each row holds one sample, and S is the length of the longest.
    """

    def __init__(self, rows: Sequence[Sequence[Sample]], row_tokens: int | None = None):
        self.rows = rows
        self.packed = row_tokens is not None
        self.length = row_tokens or max(sample.num_tokens for row in rows for sample in row)

    def __iter__(self) -> Iterator[Placed]:
        for index, row in enumerate(self.rows):
            start = 0
            for sample in row:
                yield Placed(sample, index, start, start + sample.num_tokens)
                start += sample.num_tokens

    def stack(self, features: Sequence[str] | None = None) -> Batch:
        """Features as [B, S, ...], with zeros in the padding; all of them, or those named by `features`.

        Always copies into fresh memory, so that numbers do not depend on how a store aligned its bytes.

        The batch also has `num_tokens`, its tokens without padding; `sample_ids`, in order; and with packing `position`,
        int64 [B, S], of each token in its sample, otherwise None. The padding counts as one more sample: samples begin
        where the position is 0.
        """
        first = self.rows[0][0].tensors
        samples = [sample for row in self.rows for sample in row]
        batch: Batch = {
            "num_tokens": sum(sample.num_tokens for sample in samples),
            "sample_ids": [sample.sample_id for sample in samples],
            "position": self._position() if self.packed else None,
        }
        for name in features or first:
            stacked = torch.zeros(len(self.rows), self.length, *first[name].shape[1:], dtype=first[name].dtype)
            for sample, row, start, stop in self:
                stacked[row, start:stop] = sample.tensors[name]
            batch[name] = stacked
        return batch

    def _position(self) -> Tensor:
        starts = torch.zeros(len(self.rows), self.length, dtype=torch.int64)
        for _, row, start, stop in self:
            starts[row, start:stop] = start
            starts[row, stop:] = stop
        return torch.arange(self.length) - starts
