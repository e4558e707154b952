"""NaN or infinity ends a fit, on all ranks at the same step."""

from collections.abc import Iterable
from typing import NoReturn

import lightning as L
import torch
from torch import Tensor, distributed, nn

from lightning_dataflow.contracts import NotFiniteError
from lightning_dataflow.data.collate import Batch
from lightning_dataflow.data.finite import first_not_finite
from lightning_dataflow.strategies.optimisation import gradient_norm
from lightning_dataflow.strategies.warm_start import some

NAMES_SHOWN = 8
REMEDY = "start again with a lower optimizer.lr or trainer.gradient_clip_val, or list these samples in data.skip_ids"


class NumberCheck:
    """Checks the features, loss and gradients of each optimizer step of one fit, and the draft's weights.

    Attributes:
        failure: the error that has ended the fit.
    """

    def __init__(self) -> None:
        self.failure: NotFiniteError | None = None
        self._seqs = range(0)
        self._names: list[str] = []  # names of this rank's samples in the window
        self._broken: str | None = None  # what is wrong with their features

    def add(self, batch: Batch, start: int) -> None:
        """Add a micro-batch of the window that begins at seq `start`."""
        seqs = range(start, batch["next_seq"])
        if self._seqs != seqs:
            self._seqs, self._names, self._broken = seqs, [], None
        self._names += batch["source_ids"]
        self._broken = self._broken or batch["broken"]

    def norm(self, parameters: Iterable[nn.Parameter], trainer: L.Trainer) -> Tensor:
        """This rank's share of the gradient's norm, a scalar. NaN if its features are broken, so that the reduction tells
        every rank; 0 under a GradScaler."""
        norm = gradient_norm(parameters)
        if self._broken is not None:
            return torch.full_like(norm, float("nan"))
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        return torch.zeros_like(norm) if has_scaler else norm

    def check_step(self, loss: Tensor, norm: Tensor, trainer: L.Trainer) -> None:
        """Raise NotFiniteError before a step spoils the weights. Waits for the device once.

        Args:
            loss, norm: scalars, reduced over all ranks.
        """
        if torch.stack([loss, norm]).isfinite().all().item():
            return
        names, broken = self._of_all_ranks(trainer)
        what = "the loss" if not loss.isfinite() else "the gradient's norm"
        self._fail(f"step {trainer.global_step + 1}, of {names}: {broken or f'{what} is NaN or infinity: {REMEDY}'}")

    def check_weights(self, draft: nn.Module, trainer: L.Trainer) -> None:
        """Raise NotFiniteError if one has ended the fit, or if a weight is NaN or infinity. A collective."""
        if self.failure is not None:
            raise self.failure
        name = first_not_finite(dict(draft.named_parameters()))
        num_ranks = torch.tensor(float(name is not None), device=trainer.strategy.root_device)
        if trainer.strategy.reduce(num_ranks, reduce_op="sum") > 0:
            names, _ = self._of_all_ranks(trainer)
            self._fail(
                f"step {trainer.global_step}, of {names}: the draft's weights hold NaN or infinity "
                f"({name or 'on another rank'}) and are not saved: start again with a lower optimizer.lr"
            )

    def _fail(self, message: str) -> NoReturn:
        self.failure = NotFiniteError(message)
        raise self.failure

    def _of_all_ranks(self, trainer: L.Trainer) -> tuple[str, str | None]:
        """All ranks' sample names as text, and what is wrong with the first broken features. A collective."""
        mine = (self._names, self._broken)
        gathered = [mine] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(gathered, mine)
        names = [name for shares, _ in gathered for name in shares]
        if not names:
            return "no samples yet", None
        broken = next((broken for _, broken in gathered if broken is not None), None)
        return f"samples {some(names, NAMES_SHOWN)} (seq {self._seqs.start} to {self._seqs.stop - 1})", broken
