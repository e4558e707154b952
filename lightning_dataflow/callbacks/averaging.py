"""Lightning's WeightAveraging and EMAWeightAveraging on a draft: what it must not average, and what it would lose."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel


def follow_buffers(trainer: L.Trainer) -> None:
    """Have every update copy the draft's buffers, whatever `use_buffers` says: the maps of a reduced vocabulary are ids,
    which have no mean."""
    for average in _averages(trainer):
        average.use_buffers = False


def end_averages(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor] | None:
    """To call before `on_train_end`, where Lightning overwrites the draft with its average.

    Without an update so far, the average would be the draft before training; it becomes the trained one. Returns a copy of
    the trained weights on the CPU, from which a later checkpoint's training can go on; None if nothing is averaged.
    """
    averages = _averages(trainer)
    for average in averages:
        if average.n_averaged == 0:
            average.module.load_state_dict(module.state_dict())
    return {name: tensor.to("cpu", copy=True) for name, tensor in module.state_dict().items()} if averages else None


def complete_average(checkpoint: dict[str, Any], trained: dict[str, Tensor] | None) -> None:
    """Correct what Lightning puts into a checkpoint: before the first update, the draft before training as the average;
    after the end of training, the average as the weights that training goes on from.

    Args:
        trained: weights at the end of training, if it has ended.
    """
    if "averaging_state" not in checkpoint:
        return
    if trained is not None:
        checkpoint["current_model_state"] = trained
    if checkpoint["averaging_state"]["n_averaged"] == 0:
        checkpoint["state_dict"] = checkpoint["current_model_state"]


@contextmanager
def averaged_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Within, the draft holds its averaged weights, if there are any, as a checkpoint saved now would."""
    callbacks = [callback for callback in _callbacks(trainer) if callback._average_model.n_averaged > 0]
    for callback in callbacks:
        callback.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for callback in reversed(callbacks):
            callback.on_validation_epoch_end(trainer, module)


def _averages(trainer: L.Trainer) -> list[AveragedModel]:
    return [callback._average_model for callback in _callbacks(trainer)]


def _callbacks(trainer: L.Trainer) -> list[Any]:
    """Averaging callbacks that have copied the model. No public attribute gives that copy."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in callbacks if isinstance(one, WeightAveraging) and one._average_model is not None]
