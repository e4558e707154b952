"""The sums of one accumulation window."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dataflow.strategies.common.sums import ObjectiveSums


class WindowSums:
    """Adds up the sums of a window's micro-batches on their device; one reduction over all ranks ends the window."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, sums: ObjectiveSums) -> None:
        """Add one micro-batch."""
        for name, quotient in {"loss": sums.loss, **sums.metrics}.items():
            pair = quotient.numerator.detach().float(), quotient.denominator.detach().float()
            known = self._sums.get(name)
            self._sums[name] = pair if known is None else (known[0] + pair[0], known[1] + pair[1])

    def reduce(self, reduce: Callable[..., Any], norm: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Sum over all ranks and start a new window. One message carries the sums and `norm`, a scalar of this rank.

        Returns the mean of every sum (0 where nothing was counted), the loss's denominator, and the sum of the norms.
        """
        flat = torch.cat([part.reshape(-1) for pair in self._sums.values() for part in pair] + [norm.reshape(1)])
        sizes = [part.numel() for pair in self._sums.values() for part in pair]
        parts = iter(reduce(flat, reduce_op="sum").split([*sizes, 1]))
        totals = {name: (next(parts).view_as(pair[0]), next(parts).view_as(pair[1])) for name, pair in self._sums.items()}
        self._sums = {}
        means = {name: top / bottom.clamp(min=1e-12) for name, (top, bottom) in totals.items()}
        return means, totals["loss"][1], next(parts)[0]
