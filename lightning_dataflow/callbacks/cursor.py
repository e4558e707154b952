"""Moves the stream's cursor when an optimizer step has used a window."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dataflow.callbacks.steps import StepCallback
from lightning_dataflow.contracts import NotFiniteError


class StreamCursor(StepCallback):
    """Tells the DataModule which samples are trained, after each optimizer step and before any checkpoint of it.

    ModelCheckpoint always runs after other callbacks, so its checkpoint holds the new cursor.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A new fit starts at the first sample, a resumed one at its checkpoint's cursor."""
        super().on_train_start(trainer, pl_module)
        # Without this, ModelCheckpoint would save the step that it resumes from again, inside the next window.
        _mark_as_saved(trainer)
        trainer.datamodule.start(resumed=trainer.global_step > 0)  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Saving is synchronous, so any checkpoint written before this batch is complete."""
        trainer.datamodule.mark_saved(trainer.global_step)  # type: ignore[attr-defined]

    def on_step(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        trainer.datamodule.mark_applied(batch["next_seq"], trainer.global_step)  # type: ignore[attr-defined]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.datamodule.share_skipped()  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.datamodule.mark_saved(trainer.global_step)  # type: ignore[attr-defined]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """After a NotFiniteError nothing is saved. This runs before ModelCheckpoint's own hook, which may save."""
        if isinstance(exception, NotFiniteError):
            _mark_as_saved(trainer)


def _mark_as_saved(trainer: L.Trainer) -> None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = trainer.global_step
