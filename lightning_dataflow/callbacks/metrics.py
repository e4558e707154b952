"""How fast a run is and what it waits for."""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning as L

from lightning_dataflow.callbacks.steps import StepCallback


@dataclass
class Totals:
    """Counts of a whole run, also over its resumes.

    Attributes:
        num_tokens: over all ranks.
        num_positions, num_filled: positions of this process's batches, and how many of them hold a token.
    """

    num_tokens: int = 0
    num_positions: int = 0
    num_filled: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Time spent on batches so far, never 0."""
        return max(self.train_seconds + self.wait_seconds, 1e-9)


class RunMetrics(StepCallback):
    """Logs tokens/s, the share of time spent waiting for data, and refs and bytes in flight.

    Rates are over all ranks and since the last log. Time is that of waiting for batches and of training on them; put this
    callback before others whose work (an evaluation, say) should not count. In `topology=online` the target runs while
    the trainer waits, so its time counts as waiting for data. Totals continue from a checkpoint's.
    """

    def __init__(self) -> None:
        self.total = Totals()
        self._logged = Totals()
        self._waited_before = 0.0  # in the fits that this one resumes

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self.total = Totals()
        self._waited_before = self.total.wait_seconds
        self._logged = replace(self.total)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.total.train_seconds += time.perf_counter() - self._batch_start
        self.total.wait_seconds = self._waited_before + trainer.datamodule.wait_seconds  # type: ignore[attr-defined]
        self.total.num_positions += batch["input_ids"].numel()
        self.total.num_filled += batch["num_tokens"]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        self.total.num_tokens += batch["window_num_tokens"]
        if self.is_log_step(trainer):
            self._log(trainer, pl_module)

    def rates(self, num_samples: int) -> dict[str, float]:
        """Rates over the whole run, and the share of positions that hold no token, for `result.json`."""
        total = self.total
        return {
            "seconds": total.train_seconds + total.wait_seconds,
            "tokens_per_second": total.num_tokens / total.seconds,
            "samples_per_second": num_samples / total.seconds,
            "data_wait_fraction": total.wait_seconds / total.seconds,
            "padding_fraction": 1 - total.num_filled / max(total.num_positions, 1),
        }

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.total)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = Totals(**state_dict)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last, self._logged = self._logged, replace(self.total)
        elapsed = max(self.total.seconds - last.seconds, 1e-9)
        pl_module.log("tokens/s", (self.total.num_tokens - last.num_tokens) / elapsed, prog_bar=True, batch_size=1)
        pl_module.log("data_wait", (self.total.wait_seconds - last.wait_seconds) / elapsed, prog_bar=True, batch_size=1)
        in_flight = trainer.datamodule.source.in_flight()  # type: ignore[attr-defined]
        pl_module.log_dict({f"data/{name}": float(value) for name, value in in_flight.items()}, batch_size=1)
