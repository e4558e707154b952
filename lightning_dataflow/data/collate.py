"""From samples of different lengths to one padded batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """

    sample_id: str
    source_id: str
    pass_index: int
    num_tokens: int
    tensors: Mapping[str, Tensor]


def pad_samples(samples: Sequence[Sample], features: Sequence[str] | None = None) -> Batch:
    """Stack features to [B, S_max, ...] with zeros on the right.

    Always copies into fresh memory, so that numbers do not depend on how a store aligned its bytes. `num_tokens` is the
    batch's Σ S before padding, `sample_ids` names its rows. `features` leaves the others out.
    """
    length = max(sample.num_tokens for sample in samples)
    batch: Batch = {
        "num_tokens": sum(sample.num_tokens for sample in samples),
        "sample_ids": [sample.sample_id for sample in samples],
    }
    for name in features or samples[0].tensors:
        first = samples[0].tensors[name]
        padded = torch.zeros(len(samples), length, *first.shape[1:], dtype=first.dtype)
        for row, sample in enumerate(samples):
            padded[row, : sample.num_tokens] = sample.tensors[name]
        batch[name] = padded
    return batch
