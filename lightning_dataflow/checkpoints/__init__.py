"""Checkpoints: which are complete, how they are written and read, and a Trainer that takes care of both."""

from lightning_dataflow.checkpoints.markers import latest_checkpoint
from lightning_dataflow.checkpoints.reading import read_header
from lightning_dataflow.checkpoints.trainer import DataFlowTrainer

__all__ = ["DataFlowTrainer", "latest_checkpoint", "read_header"]
