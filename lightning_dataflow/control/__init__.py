"""The control plane: leases, commits, acknowledgements and backpressure. Nothing here carries a tensor."""

from lightning_dataflow.control.leases import MAX_ATTEMPTS, Lease, NoLease, RunPlan, Watermarks
from lightning_dataflow.control.ledger import MetadataStore
from lightning_dataflow.control.local.ledger import SqliteMetadataStore
from lightning_dataflow.control.noop import NoOpMetadataStore
from lightning_dataflow.control.plane import ControlPlane, Reconciliation, reconcile_on_restart, resolve_control_plane
from lightning_dataflow.control.redis.ledger import RedisMetadataStore

__all__ = [
    "MAX_ATTEMPTS",
    "ControlPlane",
    "Lease",
    "MetadataStore",
    "NoLease",
    "NoOpMetadataStore",
    "Reconciliation",
    "RedisMetadataStore",
    "RunPlan",
    "SqliteMetadataStore",
    "Watermarks",
    "reconcile_on_restart",
    "resolve_control_plane",
]
