"""The base of callbacks that act once per optimizer step."""

from typing import Any

import lightning as L


class StepCallback(L.Callback):
    """Calls `on_step` after each optimizer step; Lightning's `on_train_batch_end` runs after each micro-batch."""

    _seen_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self.on_step(trainer, pl_module, batch)

    def on_step(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        """The optimizer step that `batch` completed has run."""

    def is_log_step(self, trainer: L.Trainer) -> bool:
        """Whether this step is one that Lightning logs, or the last."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self._seen_step % every == 0 or self._seen_step == trainer.max_steps
