"""From references to batches: windows, collation, and the LightningDataModule."""

from lightning_dataflow.data.collate import Sample, pad_samples
from lightning_dataflow.data.datamodule import DataFlowDataModule
from lightning_dataflow.data.offline import OfflineSource
from lightning_dataflow.data.source import FeatureCard, RefSource
from lightning_dataflow.data.windows import PassOrder, rank_slice

__all__ = [
    "DataFlowDataModule",
    "FeatureCard",
    "OfflineSource",
    "PassOrder",
    "RefSource",
    "Sample",
    "pad_samples",
    "rank_slice",
]
