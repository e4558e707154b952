"""What follows from the settings."""

from lightning_dataflow.config.schema import StoreConfig, TopologyConfig, TrainConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.control.leases import Watermarks

SHARE_OF_CAPACITY = 0.8
"""What may be in flight: a store that is nearly full has room, but not in one piece."""
UNLIMITED_BYTES = 1 << 40


def is_disaggregated(config: TrainConfig) -> bool:
    """Whether producers and trainers are processes of their own."""
    return config.topology.name.startswith("disagg_")


def watermarks(topology: TopologyConfig, store: StoreConfig) -> Watermarks:
    """Bounds on what is in flight. Raises UserError when they contradict each other or the store."""
    capacity = UNLIMITED_BYTES if store.capacity_bytes is None else store.capacity_bytes
    high = topology.high_bytes if topology.high_bytes is not None else int(SHARE_OF_CAPACITY * capacity)
    if high > capacity:
        raise UserError(
            f"topology.high_bytes={high} is more than store.capacity_bytes={capacity}: lower it, or raise the capacity"
        )
    return Watermarks(
        high_bytes=high,
        high_refs=topology.high_refs,
        low_bytes=topology.low_bytes if topology.low_bytes is not None else high * 3 // 4,
        low_refs=topology.low_refs if topology.low_refs is not None else topology.high_refs * 3 // 4,
    )
