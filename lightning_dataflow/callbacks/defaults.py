"""The callbacks that a draft module brings to any Trainer."""

import lightning as L

from lightning_dataflow.callbacks.cursor import StreamCursor
from lightning_dataflow.callbacks.early import EarlyCheckpoints
from lightning_dataflow.callbacks.metrics import RunMetrics
from lightning_dataflow.callbacks.result import ResultWriter


def default_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """StreamCursor, RunMetrics, ResultWriter and EarlyCheckpoints, except those that the Trainer has already."""
    present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    return [make() for make in (StreamCursor, RunMetrics, ResultWriter, EarlyCheckpoints) if make not in present]
