"""The sums of one accumulation window."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_dataflow.data.collate import Batch
from lightning_dataflow.objectives import ObjectiveSums
from lightning_dataflow.strategies.warm_start import some

NAMES_SHOWN = 8


class WindowSums:
    """Adds up the sums of a window's micro-batches on their device; one reduction over all ranks ends the window."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, sums: ObjectiveSums) -> None:
        """Add one micro-batch."""
        for name, one in {"loss": sums.loss, **sums.metrics}.items():
            pair = one.numerator.detach().float(), one.denominator.detach().float()
            known = self._sums.get(name)
            self._sums[name] = pair if known is None else (known[0] + pair[0], known[1] + pair[1])

    def reduce(self, reduce: Callable[..., Any], norm: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Sum over ranks, start a new window. Returns the mean of every sum (0 where nothing was counted), the loss's
        denominator, and `norm`, a scalar of this rank, summed over ranks by the same message."""
        flat = torch.cat([part.reshape(-1) for pair in self._sums.values() for part in pair] + [norm.reshape(1)])
        sizes = [part.numel() for pair in self._sums.values() for part in pair]
        parts = iter(reduce(flat, reduce_op="sum").split([*sizes, 1]))
        totals = {name: (next(parts).view_as(pair[0]), next(parts).view_as(pair[1])) for name, pair in self._sums.items()}
        self._sums = {}
        means = {name: top / bottom.clamp(min=1e-12) for name, (top, bottom) in totals.items()}
        return means, totals["loss"][1], next(parts)[0]


class WindowSamples:
    """Names of a window's samples, for error messages.

    Attributes:
        broken: what is wrong with this rank's features; None if nothing is.
    """

    def __init__(self) -> None:
        self.broken: str | None = None
        self._seqs = range(0)
        self._names: list[str] = []  # this rank's

    def add(self, batch: Batch, start: int) -> None:
        """Add a micro-batch of the window that begins at seq `start`."""
        seqs = range(start, batch["next_seq"])
        if self._seqs != seqs:
            self._seqs, self._names, self.broken = seqs, [], None
        self._names += batch["source_ids"]
        self.broken = self.broken or batch["broken"]

    def of_all_ranks(self, world_size: int) -> tuple[str, str | None]:
        """The names of all ranks' samples as text, and what is wrong with the first broken features. A collective."""
        mine = (self._names, self.broken)
        found = [mine] * world_size
        if world_size > 1:
            distributed.all_gather_object(found, mine)
        names = [name for shares, _ in found for name in shares]
        if not names:
            return "no samples yet", None
        broken = next((broken for _, broken in found if broken is not None), None)
        return f"samples {some(names, NAMES_SHOWN)} (seq {self._seqs.start} to {self._seqs.stop - 1})", broken
