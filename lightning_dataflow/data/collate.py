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
        source_id, pass_index: the prompt and the pass over it, the same in every topology: random draws are keyed by them.
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
    """A sample and the positions [start, stop) of a row where it stands."""

    sample: Sample
    row: int
    start: int
    stop: int


class SampleRows:
    """The samples of one micro-batch, laid out in rows.

    Args:
        rows: the samples of each row, one after the other; at least one a row.
        row_tokens: S, the length of packed rows; None where each row holds one sample, and S is the longest.
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
        """Features as [B, S, ...], zeros where no sample stands; `features` leaves the others out.

        Always copies into fresh memory, so that numbers do not depend on how a store aligned its bytes.

        Beside them: `num_tokens`, the batch's tokens without padding; `sample_ids`, in order; and `position`, int64 [B, S],
        of each token in its sample, counted on in the padding as if that were one more: a sample begins where it is 0.
        None without packing.
        """
        placed = list(self)
        first = placed[0].sample.tensors
        batch: Batch = {
            "num_tokens": sum(one.sample.num_tokens for one in placed),
            "sample_ids": [one.sample.sample_id for one in placed],
            "position": self._position(placed) if self.packed else None,
        }
        for name in features or first:
            stacked = torch.zeros(len(self.rows), self.length, *first[name].shape[1:], dtype=first[name].dtype)
            for one in placed:
                stacked[one.row, one.start : one.stop] = one.sample.tensors[name]
            batch[name] = stacked
        return batch

    def _position(self, placed: Sequence[Placed]) -> Tensor:
        start = torch.zeros(len(self.rows), self.length, dtype=torch.int64)
        for one in placed:
            start[one.row, one.start : one.stop] = one.start
            start[one.row, one.stop :] = one.stop
        return torch.arange(self.length) - start
