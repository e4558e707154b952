"""Callbacks that every run brings along, and acceptance evaluation."""

from lightning_dataflow.callbacks.acceptance import AcceptanceEvaluation
from lightning_dataflow.callbacks.cursor import StreamCursor
from lightning_dataflow.callbacks.defaults import default_callbacks
from lightning_dataflow.callbacks.early import EarlyCheckpoints
from lightning_dataflow.callbacks.metrics import RunMetrics
from lightning_dataflow.callbacks.random_state import RandomState
from lightning_dataflow.callbacks.result import ResultWriter

__all__ = [
    "AcceptanceEvaluation",
    "EarlyCheckpoints",
    "RandomState",
    "ResultWriter",
    "RunMetrics",
    "StreamCursor",
    "default_callbacks",
]
