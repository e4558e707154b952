"""Callbacks that every run brings along, and acceptance evaluation."""

from lightning_dataflow.callbacks.acceptance import AcceptanceEvaluation
from lightning_dataflow.callbacks.cursor import StreamCursor
from lightning_dataflow.callbacks.defaults import default_callbacks
from lightning_dataflow.callbacks.early import EarlyCheckpoints
from lightning_dataflow.callbacks.metrics import RunMetrics
from lightning_dataflow.callbacks.result import ResultWriter

__all__ = ["AcceptanceEvaluation", "EarlyCheckpoints", "ResultWriter", "RunMetrics", "StreamCursor", "default_callbacks"]
