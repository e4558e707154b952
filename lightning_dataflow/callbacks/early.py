"""A checkpoint between those that the user asked for."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class EarlyCheckpoints:
    """Writes checkpoints when the store needs room; see `data.kept`.

    Attributes:
        count: written so far, in this fit.
    """

    def __init__(self) -> None:
        self.count = 0
        self._previous: Path | None = None

    def save(self, trainer: L.Trainer) -> None:
        """Write one of this step, through the Trainer's ModelCheckpoint, which names it and removes old ones.

        Where that watches a metric and this step is not among its best, beside it. Every rank calls it.
        """
        self.count += 1
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint):
            callback._save_topk_checkpoint(trainer, callback._monitor_candidates(trainer))
            if callback._last_global_step_saved == trainer.global_step:
                return
        folder = getattr(callback, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        path = Path(folder) / f"step-{trainer.global_step:06d}.ckpt"
        trainer.save_checkpoint(path)
        if self._previous is not None:
            trainer.strategy.remove_checkpoint(self._previous)
        self._previous = path
