"""Callbacks that every run needs, and acceptance evaluation."""

import lightning as L

from lightning_dataflow.callbacks.acceptance import AcceptanceEvaluation as AcceptanceEvaluation
from lightning_dataflow.callbacks.cursor import StreamCursor as StreamCursor
from lightning_dataflow.callbacks.early import EarlyCheckpoints as EarlyCheckpoints
from lightning_dataflow.callbacks.metrics import RunMetrics as RunMetrics
from lightning_dataflow.callbacks.random_state import RandomState as RandomState
from lightning_dataflow.callbacks.result import ResultWriter as ResultWriter


def default_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks that every run needs, without those whose class the Trainer already has."""
    present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    needed = (StreamCursor, RandomState, RunMetrics, ResultWriter, EarlyCheckpoints)
    return [kind() for kind in needed if kind not in present]
