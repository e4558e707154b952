"""Channels: the append-only log of references between producers and trainers."""

from lightning_dataflow.channels.base import StreamingRefChannel
from lightning_dataflow.channels.file import FileChannel

__all__ = ["FileChannel", "StreamingRefChannel"]
