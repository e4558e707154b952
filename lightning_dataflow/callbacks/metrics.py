"""How fast a run is and what it waits for."""

import time
from typing import Any

import lightning as L


class RunMetrics(L.Callback):
    """Logs tokens/s, samples/s, the share of time spent waiting for data, and refs and bytes in flight.

    Rates are over all ranks and since the last log. Time is that of waiting for batches and of training on them; put this
    callback before others whose work (an evaluation, say) should not count. In `topology=online` the target runs while
    the trainer waits, so its time is data-wait. Totals go on where a checkpoint left them.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_positions = 0
        self.num_filled = 0
        self.train_seconds = 0.0
        self.wait_seconds = 0.0
        self._waited_before = 0.0  # in the fits that this one goes on from
        self._logged = (0.0, 0, 0.0)

    @property
    def seconds(self) -> float:
        """Time spent on batches so far, in this process."""
        return self.train_seconds + self.wait_seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook."""
        self._step = trainer.global_step
        if trainer.global_step == 0:
            self.num_tokens, self.train_seconds, self.wait_seconds = 0, 0.0, 0.0
        self._waited_before = self.wait_seconds
        self._logged = self.seconds, self.num_tokens, self.wait_seconds

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Lightning's hook."""
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        self.train_seconds += time.perf_counter() - self._batch_start
        self.wait_seconds = self._waited_before + trainer.datamodule.wait_seconds  # type: ignore[attr-defined]
        self.num_positions += batch["input_ids"].numel()
        self.num_filled += batch["num_tokens"]
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.num_tokens += batch["window_num_tokens"]
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._step % every == 0 or self._step == trainer.max_steps:
            self._log(trainer, pl_module)

    def totals(self, num_samples: int) -> dict[str, float]:
        """Rates over the whole run, and the share of positions of this process's batches that no token filled, for
        `result.json`."""
        seconds = max(self.seconds, 1e-9)
        return {
            "seconds": self.seconds,
            "tokens_per_second": self.num_tokens / seconds,
            "samples_per_second": num_samples / seconds,
            "data_wait_fraction": self.wait_seconds / seconds,
            "padding_fraction": 1 - self.num_filled / max(self.num_positions, 1),
        }

    def state_dict(self) -> dict[str, float]:
        """Lightning's hook."""
        return {
            "num_tokens": self.num_tokens,
            "num_positions": self.num_positions,
            "num_filled": self.num_filled,
            "train_seconds": self.train_seconds,
            "wait_seconds": self.wait_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Lightning's hook."""
        self.num_tokens = int(state_dict["num_tokens"])
        self.num_positions, self.num_filled = int(state_dict["num_positions"]), int(state_dict["num_filled"])
        self.train_seconds, self.wait_seconds = state_dict["train_seconds"], state_dict["wait_seconds"]

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = self.seconds, self.num_tokens, self.wait_seconds
        elapsed, tokens, waited = (new - old for new, old in zip(now, self._logged, strict=True))
        self._logged = now
        elapsed = max(elapsed, 1e-9)
        pl_module.log("tokens/s", tokens / elapsed, prog_bar=True, batch_size=1)
        pl_module.log("data_wait", waited / elapsed, prog_bar=True, batch_size=1)
        in_flight = trainer.datamodule.source.in_flight()  # type: ignore[attr-defined]
        pl_module.log_dict({f"data/{name}": float(value) for name, value in in_flight.items()}, batch_size=1)
