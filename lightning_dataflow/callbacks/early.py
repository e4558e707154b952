"""Checkpoints between those that the user asked for."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dataflow.callbacks.steps import StepCallback


class EarlyCheckpoints(StepCallback):
    """Writes a checkpoint when features that only a checkpoint frees fill the store; see `data.kept`.

    Put it behind callbacks that have state of their own, so that its checkpoints hold the state after the step.

    Attributes:
        count: checkpoints written in this fit.
    """

    def __init__(self) -> None:
        self.count = 0
        self._previous: Path | None = None

    def on_step(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        """All ranks decide the same."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.global_step < trainer.max_steps and data.source.must_save():
            self.count += 1
            self._save(trainer)
            data.mark_saved(trainer.global_step)

    def _save(self, trainer: L.Trainer) -> None:
        """Save through the Trainer's ModelCheckpoint, which names the file and removes old ones.

        If it watches a metric and this step is not among its best, save a file of our own beside its files.
        """
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint):
            callback._save_topk_checkpoint(trainer, callback._monitor_candidates(trainer))
            if callback._last_global_step_saved == trainer.global_step and not callback.save_weights_only:
                return
        folder = getattr(callback, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        path = Path(folder) / f"step-{trainer.global_step:06d}.ckpt"
        trainer.save_checkpoint(path)
        if self._previous is not None:
            trainer.strategy.remove_checkpoint(self._previous)
        self._previous = path
