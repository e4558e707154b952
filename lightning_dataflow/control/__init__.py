"""The control plane: leases, commits, acknowledgements and backpressure. Nothing here carries a tensor."""

from lightning_dataflow.control.base import MAX_ATTEMPTS, Captured, Lease, MetadataStore, RunPlan, Watermarks
from lightning_dataflow.control.noop import NoOpMetadataStore
from lightning_dataflow.control.plane import (
    ControlPlane,
    Reconciliation,
    reconcile_on_restart,
    resolve_control_plane,
)
from lightning_dataflow.control.redis import RedisMetadataStore
from lightning_dataflow.control.sqlite import SqliteMetadataStore

__all__ = [
    "MAX_ATTEMPTS",
    "Captured",
    "ControlPlane",
    "Lease",
    "MetadataStore",
    "NoOpMetadataStore",
    "Reconciliation",
    "RedisMetadataStore",
    "RunPlan",
    "SqliteMetadataStore",
    "Watermarks",
    "reconcile_on_restart",
    "resolve_control_plane",
]
