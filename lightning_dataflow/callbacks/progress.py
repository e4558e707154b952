"""Progress where there is no terminal."""

import sys
from typing import Any

import lightning as L

from lightning_dataflow.callbacks.steps import StepCallback


class PlainProgress(StepCallback):
    """A line on standard output every `log_every_n_steps` optimizer steps and for the last: step, total, the bar's metrics.

    Like the progress bar that it replaces, this is output, so it prints and does not log. A progress bar redraws itself; in
    a file, under SLURM or in a container it shows nothing before the end. Silent on a terminal, and where the Trainer has
    no progress bar.
    """

    def on_step(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        if not trainer.is_global_zero or trainer.progress_bar_callback is None or sys.stdout.isatty():
            return
        if self.is_log_step(trainer):
            metrics = ", ".join(f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
            print(f"step {trainer.global_step}/{trainer.max_steps}: {metrics}", flush=True)
