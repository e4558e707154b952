"""Objectives return sums, so that losses and gradients do not depend on how samples are cut into batches."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Quotient:
    """Numerator and denominator of a mean, scalars or vectors of one shape. Both are summed before they are divided."""

    numerator: Tensor
    denominator: Tensor


@dataclass(frozen=True, kw_only=True)
class ObjectiveSums:
    """What one micro-batch adds to the loss and to every metric.

    Attributes:
        loss: scalar sums; the numerator carries the gradient.
        metrics: detached sums by name.
    """

    loss: Quotient
    metrics: Mapping[str, Quotient]
