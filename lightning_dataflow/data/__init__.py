"""From references to batches: sources, windows, the queue, prefetch, collation, and the LightningDataModule."""

from lightning_dataflow.data.collate import Sample, SampleRows
from lightning_dataflow.data.datamodule import DataFlowDataModule
from lightning_dataflow.data.manifest import ManifestSource
from lightning_dataflow.data.offline import OfflineSource
from lightning_dataflow.data.queue import StreamingRefQueue
from lightning_dataflow.data.source import FeatureCard, RefSource, RefWindow
from lightning_dataflow.data.streaming import StreamingSource
from lightning_dataflow.data.windows import Batching, PassOrder, rank_slice

__all__ = [
    "Batching",
    "DataFlowDataModule",
    "FeatureCard",
    "ManifestSource",
    "OfflineSource",
    "PassOrder",
    "RefSource",
    "RefWindow",
    "Sample",
    "SampleRows",
    "StreamingRefQueue",
    "StreamingSource",
    "rank_slice",
]
