"""Feature stores: where tensors wait between capture and training."""

from lightning_dataflow.stores.base import FeatureStore, feature_specs
from lightning_dataflow.stores.memory import MemoryFeatureStore
from lightning_dataflow.stores.shared_dir import SharedDirFeatureStore

__all__ = ["FeatureStore", "MemoryFeatureStore", "SharedDirFeatureStore", "feature_specs"]
