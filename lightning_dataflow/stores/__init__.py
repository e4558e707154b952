"""Feature stores: where tensors wait between capture and training."""

from lightning_dataflow.stores.base import FeatureStore, StoreUnavailableError
from lightning_dataflow.stores.memory import MemoryFeatureStore
from lightning_dataflow.stores.mooncake.store import MooncakeFeatureStore
from lightning_dataflow.stores.shared_dir import SharedDirFeatureStore

__all__ = [
    "FeatureStore",
    "MemoryFeatureStore",
    "MooncakeFeatureStore",
    "SharedDirFeatureStore",
    "StoreUnavailableError",
]
