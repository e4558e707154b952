"""From references to batches: sources, windows, the queue, prefetch, collation, and the LightningDataModule."""

from lightning_dataflow.data.collate import Sample as Sample, SampleRows as SampleRows
from lightning_dataflow.data.datamodule import DataFlowDataModule as DataFlowDataModule
from lightning_dataflow.data.manifest import ManifestSource as ManifestSource
from lightning_dataflow.data.offline import OfflineSource as OfflineSource
from lightning_dataflow.data.queue import StreamingRefQueue as StreamingRefQueue
from lightning_dataflow.data.source import FeatureCard as FeatureCard, RefSource as RefSource, RefWindow as RefWindow
from lightning_dataflow.data.streaming import StreamingSource as StreamingSource
from lightning_dataflow.data.windows import Batching as Batching, PassOrder as PassOrder
