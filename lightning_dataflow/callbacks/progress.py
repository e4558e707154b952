"""Progress where there is no terminal."""

import sys
from typing import Any

import lightning as L


class PlainProgress(L.Callback):
    """A line on standard output every `log_every_n_steps` optimizer steps and for the last: step, total, the bar's metrics.

    A progress bar redraws itself; in a file, under SLURM or in a container it shows nothing before the end. Silent on a
    terminal, and where the Trainer has no progress bar.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = self._step % every == 0 or self._step == trainer.max_steps
        if due and trainer.is_global_zero and trainer.progress_bar_callback is not None and not sys.stdout.isatty():
            metrics = ", ".join(f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
            print(f"step {self._step}/{trainer.max_steps}: {metrics}", flush=True)
