"""Stores, control planes, sources and workers of each topology."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from lightning_dataflow.config.files import read_secret, redis_address
from lightning_dataflow.config.rules import watermarks
from lightning_dataflow.config.run_id import run_id
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.control import ControlPlane, resolve_control_plane
from lightning_dataflow.control.heartbeat import Heartbeat
from lightning_dataflow.control.plane import PATIENCE_S, DeploymentMode
from lightning_dataflow.data import ManifestSource, StreamingSource
from lightning_dataflow.producers import ColocatedSource, OnlineSource, RolloutWorker
from lightning_dataflow.producers.feeds import Feed, ServedFeed
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.run.ranks import num_devices, rank_from_environment
from lightning_dataflow.sglang_plugin.settings import ARGUMENTS, KNOWN
from lightning_dataflow.stores import FeatureStore, MemoryFeatureStore, MooncakeFeatureStore, SharedDirFeatureStore
from lightning_dataflow.targets import TargetEngine

MODES: dict[str, DeploymentMode] = {"noop": "local_colocated", "memory": "dataflow_colocated"}
"""Of ledgers that one process has for itself."""


def control_plane(config: TrainConfig, *, patience_s: float = PATIENCE_S) -> ControlPlane:
    """The run's ledger and log. Each rank has its own where the ledger is in memory.

    Args:
        patience_s: how long to wait for a Redis that does not answer.
    """
    mode, path = MODES.get(config.control.kind, "disaggregated"), Path(config.channel.path)
    redis = redis_address(config.channel, "channel.secret_file") if config.channel.kind == "redis" else None
    if mode == "dataflow_colocated":
        path = path / f"rank-{rank_from_environment(num_devices(config.trainer))}"
    return resolve_control_plane(mode, run_id(config.run_name), path=path, redis=redis, patience_s=patience_s)


def store_id(plane: ControlPlane) -> str:
    """Unique id of the run's store, so that two runs of one name can share a Mooncake."""
    return f"{plane.run_id}.{plane.log.nonce()}"


def shared_store(config: TrainConfig, plane: ControlPlane, *, retain: bool = False) -> FeatureStore:
    """The store that producers and trainers of a disaggregated run share."""
    settings = store_settings(config)
    if settings.pop("store") == "shared_dir":
        return SharedDirFeatureStore(retain=retain, **settings)
    arguments = {ARGUMENTS.get(name, name): value for name, value in settings.items()}
    return MooncakeFeatureStore(store_id(plane), retain=retain, **arguments)


def store_settings(config: TrainConfig) -> dict[str, Any]:
    """The store that a disaggregated run shares, as the file of a capture server describes it; see ServerStores."""
    store = config.store
    settings = {name: getattr(store, name) for name in KNOWN["mooncake"]}
    if store.kind == "shared_dir":
        root = Path(store.root or Path(config.channel.path) / "features").absolute()
        settings = {"root": str(root), "secret": read_secret(store), "capacity_bytes": store.capacity_bytes}
    return {"store": store.kind, **{name: value for name, value in settings.items() if value is not None}}


def colocated_source(config: TrainConfig, prompts: PromptDataset, target: TargetEngine) -> OnlineSource | ColocatedSource:
    """Samples that this process captures itself, for `online` and `interleaved`."""
    store, plane = MemoryFeatureStore(config.store.capacity_bytes), control_plane(config)
    group = config.target.capture_batch_size
    if plane.channel is None:
        return OnlineSource(prompts, target, store, plane=plane, capture_batch_size=group)
    return ColocatedSource(
        prompts,
        target,
        plane,
        store,
        watermarks(config),
        seed=config.seed,
        capture_batch_size=group,
        threaded=config.topology.name == "interleaved",
        idle_timeout_s=config.topology.idle_timeout_s,
    )


def streaming_source(config: TrainConfig, plane: ControlPlane) -> StreamingSource:
    """Samples that producers put into the run's store."""
    topology = config.topology
    timeouts: dict[str, Any] = {"start_timeout_s": topology.start_timeout_s, "idle_timeout_s": topology.idle_timeout_s}
    if topology.name == "disagg_offline":
        return ManifestSource(plane, shared_store(config, plane, retain=True), **timeouts)
    return StreamingSource(
        plane,
        shared_store(config, plane),
        durable_below=watermarks(config) if topology.release_at == "durable" else None,
        **timeouts,
    )


def make_workers(
    name: str,
    config: TrainConfig,
    plane: ControlPlane,
    load: Callable[[], tuple[Feed, FeatureStore]],
    resources: ExitStack,
) -> list[RolloutWorker]:
    """The producers of this process: as many as its target can capture for at a time.

    Loading takes minutes. Meanwhile a heartbeat keeps this process listed as alive.

    Args:
        load: returns the feed and the store.
        resources: closes the control planes of all workers but the first.
    """
    with Heartbeat(plane.ledger, f"{name}-0", lambda: "loading").until("loaded"):
        feed, store = load()
        num_workers = feed.target.num_requests if isinstance(feed, ServedFeed) else 1
        others = [resources.enter_context(closing(control_plane(config))) for _ in range(1, num_workers)]
        return [
            RolloutWorker(
                f"{name}-{index}",
                feed,
                own_plane,
                store,
                watermarks(config),
                group=config.target.capture_batch_size,
                lease_s=config.topology.lease_s,
                peer_timeout_s=config.topology.start_timeout_s,
            )
            for index, own_plane in enumerate([plane, *others])
        ]
