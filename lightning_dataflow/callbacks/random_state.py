"""Random state in checkpoints, which Lightning leaves out."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import distributed

from lightning_dataflow.callbacks.steps import StepCallback

NUMPY_STATE = ("words", "pos", "has_gauss", "gauss")


class RandomState(StepCallback):
    """Saves the random state of torch (CPU, and the rank's GPU), python and numpy with every checkpoint, and restores it.

    Each rank gets its own state back. With another number of ranks this is best effort: rank i takes the state that rank i
    had, and new ranks keep the seed that they start with. Draws of the prefetch thread are not covered; nothing in this
    package draws there.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._window_start: dict[str, Any] | None = None  # the state at the start of this window; None between windows

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """All ranks take part; rank 0's checkpoint is the one that is written. A resume begins with a whole window, so
        inside a window this is the state at its start."""
        mine = self._window_start or _capture(trainer.strategy.root_device)
        states: list[Any] = [mine] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(states, mine)
        checkpoint["random_state"] = states

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("random_state")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the state once the set-up of the fit has drawn its numbers."""
        super().on_train_start(trainer, pl_module)
        states, self._restored = self._restored, None
        if states is not None and trainer.global_rank < len(states):
            _restore(states[trainer.global_rank], trainer.strategy.root_device)
        self._window_start = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._window_start is None:
            self._window_start = _capture(trainer.strategy.root_device)

    def on_step(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        self._window_start = None


def _capture(device: torch.device) -> dict[str, Any]:
    """Plain data and tensors, which load without unpickling."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": dict(zip(NUMPY_STATE, (numpy[1].tolist(), *numpy[2:]), strict=True)),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(("MT19937", *(state["numpy"][name] for name in NUMPY_STATE)))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
