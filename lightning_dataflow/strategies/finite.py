"""NaN and infinity: a bad step changes nothing, several in a row end a fit, and weights are tried before they are saved.

All ranks judge the same reduced numbers, so they agree without asking each other.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import lightning as L
import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_dataflow.contracts import NotFiniteError
from lightning_dataflow.data.collate import Batch
from lightning_dataflow.data.finite import first_not_finite
from lightning_dataflow.strategies.optimisation import gradient_norm, skip_step_if
from lightning_dataflow.strategies.warm_start import some

log = logging.getLogger(__name__)

NAMES_SHOWN = 8
DEFAULT_MAX_BAD_STEPS = 3
"""For Trainers that have no `max_bad_steps`."""
REMEDY = "start again with a lower optimizer.lr or trainer.gradient_clip_val, or list these samples in data.skip_ids"


@dataclass(kw_only=True)
class Window:
    """The window of one optimizer step, as far as this rank knows it.

    Attributes:
        step: of the run, from 1.
        names: of this rank's samples.
        broken: what is wrong with their features.
        finite: whether loss and gradient norm are, bool [2] on the host.
        arrived: passed once `finite` is there; None if it is there already.
    """

    step: int = 0
    seqs: range = range(0)
    names: list[str] = field(default_factory=list)
    broken: str | None = None
    finite: Tensor | None = None
    arrived: Any = None


class NumberCheck:
    """Judges each optimizer step of one fit on its device. The host reads a verdict one step later, without waiting.

    Before weights are saved, the loss of one micro-batch, of the fit's first good window, is computed through them again.

    Attributes:
        failure: the error that has ended the fit.
    """

    def __init__(self) -> None:
        self.failure: NotFiniteError | None = None
        self._window = Window()
        self._unread: Window | None = None  # the newest judged one
        self._probe: Batch | None = None  # on the CPU
        self._candidate: Batch | None = None  # without a probe: the window's first supervised micro-batch, else its last
        self._is_supervised = False
        self._tried_step: int | None = None  # whose weights had a finite loss

    def add(self, batch: Batch, start: int, denominator: Tensor) -> None:
        """Add a micro-batch, with the denominator of its loss, of the window that begins at seq `start`."""
        seqs = range(start, batch["next_seq"])
        if self._window.seqs != seqs:
            self._window, self._is_supervised = Window(seqs=seqs), False
        self._window.names += batch["source_ids"]
        self._window.broken = self._window.broken or batch["broken"]
        if self._probe is None and not self._is_supervised:
            self._candidate, self._is_supervised = batch, bool(denominator > 0)

    def norm(self, parameters: Iterable[nn.Parameter], trainer: L.Trainer) -> Tensor:
        """This rank's share of the gradient's norm, a scalar. NaN if its features are broken, so that the reduction tells
        every rank; 0 under a GradScaler."""
        norm = gradient_norm(parameters)
        if self._window.broken is not None:
            return torch.full_like(norm, float("nan"))
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        return torch.zeros_like(norm) if has_scaler else norm

    def judge(self, loss: Tensor, norm: Tensor, optimizer: Optimizer, trainer: L.Trainer) -> None:
        """Let the coming optimizer step change nothing unless both numbers are finite, and read the previous verdict.

        Args:
            loss, norm: scalars, reduced over all ranks.
        """
        self.read(trainer)
        finite = torch.stack([loss, norm]).isfinite()
        good = finite.all()
        skip_step_if(~good, optimizer)
        if self._probe is None and (good & (loss != 0)).item():  # waits for the device until the first good step
            self._probe, self._candidate = apply_to_collection(self._candidate, Tensor, Tensor.cpu), None
        self._window.step = trainer.global_step + 1
        self._window.finite, self._window.arrived = _copy_to_host(finite)
        self._unread = self._window

    def read(self, trainer: L.Trainer) -> None:
        """Count the newest window, unless that is done; all ranks call this at the same step.

        Raises NotFiniteError after `max_bad_steps` bad windows in a row.
        """
        window, self._unread = self._unread, None
        if window is None:
            return
        assert window.finite is not None, "judged"
        if window.arrived is not None:
            window.arrived.synchronize()
        has_loss, has_norm = window.finite.tolist()
        num_bad = trainer.datamodule.count_step(window.seqs, is_bad=not (has_loss and has_norm))  # type: ignore[attr-defined]
        if not num_bad:
            return
        names, broken = _of_all_ranks(window, trainer)
        what = "the gradient's norm" if has_loss else "the loss"
        reason = broken or f"{what} is NaN or infinity: {REMEDY}"
        limit = getattr(trainer, "max_bad_steps", DEFAULT_MAX_BAD_STEPS)
        if limit is not None and num_bad >= limit:
            count = "" if limit == 1 else f"; {num_bad} bad steps in a row (trainer.max_bad_steps={limit})"
            self._fail(f"step {window.step}, of {names}: {reason}{count}")
        if trainer.is_global_zero:
            log.warning("step %d, of %s, changed nothing: %s", window.step, names, reason)

    def check_weights(self, draft: nn.Module, trainer: L.Trainer) -> None:
        """Raise NotFiniteError if one has ended the fit, or if a weight, or the loss through them all, is NaN or infinity.

        A collective.
        """
        if self.failure is not None:
            raise self.failure
        self.read(trainer)
        name, has_loss = first_not_finite(dict(draft.named_parameters())), self._has_loss(trainer)
        found = torch.tensor([name is not None, not has_loss], dtype=torch.float32, device=trainer.strategy.root_device)
        in_weights, in_loss = trainer.strategy.reduce(found, reduce_op="sum").tolist()
        if in_weights:
            what = f"the draft's weights hold NaN or infinity ({name or 'on another rank'})"
        elif in_loss:
            what = "the loss through the draft's weights after it is NaN or infinity"
        else:
            self._tried_step = trainer.global_step
            return
        names, _ = _of_all_ranks(self._window, trainer)
        self._fail(
            f"step {trainer.global_step}, of {names}: {what}, so they are not saved: start again with a lower optimizer.lr"
        )

    def _has_loss(self, trainer: L.Trainer) -> bool:
        """Whether the probe's loss is finite on this rank. A collective under sharding."""
        if self._probe is None or self._tried_step == trainer.global_step or not trainer.training:
            return True
        device = trainer.strategy.root_device
        probe = apply_to_collection(self._probe, Tensor, lambda tensor: tensor.to(device))
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss: Any = trainer.strategy.test_step(probe, 0)
        return bool(loss.isfinite())

    def _fail(self, message: str) -> NoReturn:
        self.failure = NotFiniteError(message)
        raise self.failure


def _copy_to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """The tensor on the host, and on a GPU an event that passes once it has arrived."""
    if tensor.device.type != "cuda":
        return tensor, None
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def _of_all_ranks(window: Window, trainer: L.Trainer) -> tuple[str, str | None]:
    """All ranks' sample names as text, and what is wrong with the first broken features. A collective."""
    mine = (window.names, window.broken)
    gathered = [mine] * trainer.world_size
    if trainer.world_size > 1:
        distributed.all_gather_object(gathered, mine)
    names = [name for shares, _ in gathered for name in shares]
    if not names:
        return "no samples yet", None
    broken = next((broken for _, broken in gathered if broken is not None), None)
    return f"samples {some(names, NAMES_SHOWN)} (seq {window.seqs.start} to {window.seqs.stop - 1})", broken
