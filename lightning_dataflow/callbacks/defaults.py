"""The callbacks that a draft module brings to any Trainer."""

import lightning as L

from lightning_dataflow.callbacks.cursor import StreamCursor
from lightning_dataflow.callbacks.early import EarlyCheckpoints
from lightning_dataflow.callbacks.metrics import RunMetrics
from lightning_dataflow.callbacks.random_state import RandomState
from lightning_dataflow.callbacks.result import ResultWriter


def default_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks that every run needs, without those whose class the Trainer already has."""
    present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    needed = (StreamCursor, RandomState, RunMetrics, ResultWriter, EarlyCheckpoints)
    return [kind() for kind in needed if kind not in present]
