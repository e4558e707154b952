"""Callbacks that every run needs, and acceptance evaluation."""

from lightning_dataflow.callbacks.acceptance import AcceptanceEvaluation as AcceptanceEvaluation
from lightning_dataflow.callbacks.cursor import StreamCursor as StreamCursor
from lightning_dataflow.callbacks.defaults import default_callbacks as default_callbacks
from lightning_dataflow.callbacks.early import EarlyCheckpoints as EarlyCheckpoints
from lightning_dataflow.callbacks.metrics import RunMetrics as RunMetrics
from lightning_dataflow.callbacks.random_state import RandomState as RandomState
from lightning_dataflow.callbacks.result import ResultWriter as ResultWriter
