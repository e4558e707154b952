"""Corrections to Lightning's WeightAveraging and EMAWeightAveraging, for drafts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel


def follow_buffers(trainer: L.Trainer) -> None:
    """Make every update copy the draft's buffers, whatever `use_buffers` says: the maps of a reduced vocabulary are ids,
    which have no mean."""
    for callback in _callbacks(trainer):
        callback._average_model.use_buffers = False


def end_averages(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor] | None:
    """Call this before `on_train_end`, where Lightning overwrites the draft with its average.

    If the average was never updated, it would be the draft before training; replace it with the trained draft. Returns a
    copy of the trained weights on the CPU, so that a later checkpoint can resume from them; None if nothing is averaged.
    """
    averages: list[AveragedModel] = [callback._average_model for callback in _callbacks(trainer)]
    for average in averages:
        if average.n_averaged == 0:
            average.module.load_state_dict(module.state_dict())
    return {name: tensor.to("cpu", copy=True) for name, tensor in module.state_dict().items()} if averages else None


def complete_average(checkpoint: dict[str, Any], trained: dict[str, Tensor] | None) -> None:
    """Correct two errors of Lightning in a checkpoint: before the first update, the average is the draft before training;
    after the end of training, the weights to resume from are the average.

    Args:
        trained: the weights at the end of training, if it has ended.
    """
    if "averaging_state" not in checkpoint:
        return
    if trained is not None:
        checkpoint["current_model_state"] = trained
    if checkpoint["averaging_state"]["n_averaged"] == 0:
        checkpoint["state_dict"] = checkpoint["current_model_state"]


@contextmanager
def averaged_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Inside this context the draft holds its averaged weights, if there are any, as a checkpoint saved now would."""
    callbacks = [callback for callback in _callbacks(trainer) if callback._average_model.n_averaged > 0]
    for callback in callbacks:
        callback.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for callback in reversed(callbacks):
            callback.on_validation_epoch_end(trainer, module)


def _callbacks(trainer: L.Trainer) -> list[Any]:
    """The averaging callbacks that have copied the model. No public attribute gives that copy."""
    averaging = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
    return [callback for callback in averaging if callback._average_model is not None]
