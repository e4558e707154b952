"""What training on a stream requires of a Trainer: one endless epoch, and a number of batches."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_dataflow.contracts import UserError
from lightning_dataflow.data import DataFlowDataModule


def check_trainer(trainer: L.Trainer) -> None:
    """Raise UserError naming the first Trainer argument that does not fit a stream, and its right value.

    Lightning pulls one batch ahead of a stream unless `limit_train_batches` is a number (a resume would lose that batch),
    and starts empty epochs without end when `max_epochs` allows more than one.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DataFlowDataModule):
        raise UserError("this module trains on a DataFlowDataModule: call trainer.fit(module, datamodule)")
    if data.source.release_at == "durable" and not trainer.checkpoint_callbacks:
        raise UserError(
            "release_at=durable keeps features until a checkpoint, and this Trainer writes none: add a ModelCheckpoint "
            "(callbacks=default), or set topology.release_at=applied"
        )
    accumulation = data.accumulate_grad_batches(trainer.world_size)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_steps is None or trainer.max_steps < 1:
        raise UserError(f"Trainer(max_steps={trainer.max_steps}): a stream has no end of its own, give max_steps=N")
    batches = trainer.max_steps * accumulation
    for name, needed, reason in (
        ("max_epochs", 1, "passes over the data go on inside one epoch"),
        ("accumulate_grad_batches", accumulation, f"{data.batching} on {trainer.world_size} ranks"),
        ("limit_train_batches", batches, f"{trainer.max_steps} steps of {accumulation}; a resume would lose a batch"),
    ):
        actual = getattr(trainer, name)
        if actual != needed or isinstance(actual, float):
            raise UserError(f"Trainer({name}={actual}): give {name}={needed} ({reason})")


def check_averaging(trainer: L.Trainer) -> None:
    """Raise UserError for a callback whose averaging would discard the training, or fail. To call before its `setup`."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise UserError(
            "callback StochasticWeightAveraging averages once an epoch, before its first step, and a stream is one epoch: "
            "this would discard the training. Use Lightning's EMAWeightAveraging or WeightAveraging"
        )
    averaging = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
    if averaging and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError(
            f"callback {averaging[0]} with {type(trainer.strategy).__name__}: Lightning averages no sharded weights, use "
            "DDP (trainer=ddp) or one process"
        )


def align_loops(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Edit a checkpoint's loop state so that the epoch continues at the window of the cursor.

    Lightning counts micro-batches. Their number per step changes with the ranks and the micro-batch size, and is ahead of
    the cursor if the checkpoint was taken inside a window. A run that reached max_steps has ended the epoch, so resuming it
    with a higher max_steps would train nothing.
    """
    if "fit_loop" not in checkpoint.get("loops", {}):
        return
    fit_loop = checkpoint["loops"]["fit_loop"]
    batches = checkpoint["global_step"] * accumulation
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    for scope in ("total", "current"):
        fit_loop["epoch_progress"][scope] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        fit_loop["epoch_loop.batch_progress"][scope] |= dict.fromkeys(
            ("ready", "started", "processed", "completed"), batches
        )
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
