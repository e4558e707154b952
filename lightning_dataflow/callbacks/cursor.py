"""Moves the stream's cursor when an optimizer step has used a window."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dataflow.contracts import NotFiniteError


class StreamCursor(L.Callback):
    """Tells the DataModule, after every optimizer step and before any checkpoint of it, what is applied.

    `on_train_batch_end` with a moved `global_step` is the one hook that means "after the step"; ModelCheckpoint always
    runs after other callbacks, so its checkpoint holds the new cursor.
    """

    def __init__(self) -> None:
        self._seen_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook. A new fit starts at the first sample, a resumed one at its checkpoint's cursor."""
        self._seen_step = trainer.global_step
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                # It would save the step that it resumes from once more, after the next window's first micro-batch.
                callback._last_global_step_saved = trainer.global_step
        trainer.datamodule.start(resumed=trainer.global_step > 0)  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Lightning's hook. Whatever was saved before this batch is complete now."""
        trainer.datamodule.mark_saved(trainer.global_step)  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook."""
        trainer.datamodule.mark_saved(trainer.global_step)  # type: ignore[attr-defined]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lightning's hook, called before ModelCheckpoint's, which may save: after a NotFiniteError nothing is saved."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(exception, NotFiniteError) and isinstance(callback, ModelCheckpoint):
                callback._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            trainer.datamodule.mark_applied(batch["next_seq"], trainer.global_step)  # type: ignore[attr-defined]
