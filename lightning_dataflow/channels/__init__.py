"""Channels: the append-only log of references between producers and trainers."""

from lightning_dataflow.channels.base import StreamingRefChannel
from lightning_dataflow.channels.file import FileChannel
from lightning_dataflow.channels.redis import RedisChannel
from lightning_dataflow.channels.redis_connections import RedisAddress
from lightning_dataflow.channels.redis_local import LocalRedis

__all__ = ["FileChannel", "LocalRedis", "RedisAddress", "RedisChannel", "StreamingRefChannel"]
