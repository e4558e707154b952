"""Stores, control planes and sources of each topology."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lightning_dataflow.cli.redis_runs import read_secret_file
from lightning_dataflow.config.schema import StoreConfig, TopologyConfig, TrainConfig
from lightning_dataflow.contracts import UnknownNameError, UserError
from lightning_dataflow.control import ControlPlane, Watermarks, resolve_control_plane
from lightning_dataflow.control.heartbeat import Heartbeat
from lightning_dataflow.control.plane import DeploymentMode
from lightning_dataflow.control.redis.address import RedisAddress
from lightning_dataflow.data import ManifestSource, OfflineSource, RefSource, StreamingSource
from lightning_dataflow.data.source import ReleaseAt
from lightning_dataflow.producers import (
    ColocatedSource,
    Feed,
    FolderFeed,
    OnlineSource,
    PromptFeed,
    RolloutWorker,
    ServedFeed,
)
from lightning_dataflow.run.ranks import num_processes, rank_from_environment
from lightning_dataflow.stores import FeatureStore, MemoryFeatureStore, MooncakeFeatureStore, SharedDirFeatureStore
from lightning_dataflow.targets import ReferenceEngine

if TYPE_CHECKING:
    from lightning_dataflow.run.builder import Builder

MODES: dict[str, DeploymentMode] = {
    "noop": "local_colocated",
    "memory": "dataflow_colocated",
    "sqlite": "disaggregated",
    "redis": "disaggregated",
}
STORES = {
    "online": ("memory",),
    "interleaved": ("memory",),
    "offline": ("shared_dir",),
    "disagg_online": ("mooncake", "shared_dir"),
    "disagg_offline": ("mooncake", "shared_dir"),
}
CONTROLS = {
    "online": ("noop", "memory"),
    "interleaved": ("memory",),
    "offline": ("noop",),
    "disagg_online": ("sqlite", "redis"),
    "disagg_offline": ("sqlite", "redis"),
}
ENGINES = ("hf", "sglang", "sglang_server")
SHARE_OF_CAPACITY = 0.8
"""What may be in flight: a store that is nearly full has room, but not in one piece."""
UNLIMITED_BYTES = 1 << 40


def check_topology(config: TrainConfig) -> None:
    """Raise UserError for a topology that does not exist, or a store, ledger or role that does not fit it."""
    name = config.topology.name
    if name not in STORES:
        raise UnknownNameError(f"unknown topology {name!r}: available are {', '.join(sorted(STORES))}")
    for what, value, fitting in (
        ("store", config.store.kind, STORES[name]),
        ("control", config.control.kind, CONTROLS[name]),
    ):
        if value not in fitting:
            raise UserError(f"topology={name} does not work with {what}={value}: use {what}={' or '.join(fitting)}")
    if (config.channel.kind == "redis") != (config.control.kind == "redis"):
        raise UserError(
            f"channel={config.channel.kind} does not work with control={config.control.kind}: one transaction writes log "
            "and ledger, so set both to redis, or neither"
        )
    _check_release(config)
    engine = config.target.engine
    if engine not in ENGINES:
        raise UnknownNameError(f"unknown target.engine={engine!r}: available are {', '.join(ENGINES)}")
    if engine == "sglang_server" and name != "disagg_online":
        raise UserError(
            f"target.engine=sglang_server puts features into the store of topology=disagg_online, which topology={name} "
            "has not: use target.engine=sglang or hf, or that topology"
        )
    if config.role != "auto" and not is_disaggregated(config):
        raise UserError(
            f"topology={name} has no parts of its own, so role={config.role} has no meaning: use topology=disagg_online"
        )


def _check_release(config: TrainConfig) -> None:
    release_at, limits = config.topology.release_at, (config.topology.high_bytes, config.store.capacity_bytes)
    if release_at not in get_args(ReleaseAt):
        raise UserError(f"topology.release_at={release_at} is unknown: use {' or '.join(get_args(ReleaseAt))}")
    if release_at == "durable" and config.topology.name != "disagg_online":
        raise UserError(
            f"topology={config.topology.name} has no features that outlive their step without their process, so "
            "topology.release_at=durable has no meaning: leave it out, or use topology=disagg_online"
        )
    if release_at == "durable" and limits == (None, None):
        raise UserError(
            "topology.release_at=durable must know how much the store may hold: set topology.high_bytes, or "
            "store.capacity_bytes"
        )


def is_disaggregated(config: TrainConfig) -> bool:
    """Whether producers and trainers are processes of their own."""
    return config.topology.name.startswith("disagg_")


def run_id(config: TrainConfig) -> str:
    """The run's name as an id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", config.run_name).strip("-.")[:200] or "run"


def control_plane(config: TrainConfig) -> ControlPlane:
    """The run's ledger and log; of this rank alone where the ledger is in memory."""
    mode = MODES[config.control.kind]
    path = Path(config.channel.path)
    if config.channel.kind == "redis":
        return resolve_control_plane(mode, run_id(config), redis=redis_address(config))
    if mode == "dataflow_colocated":
        path = path / f"rank-{rank_from_environment()}"
    return resolve_control_plane(mode, run_id(config), path=path)


def redis_address(config: TrainConfig) -> RedisAddress:
    """The Redis of channel=redis. Raises UserError where no address is given."""
    channel = config.channel
    if channel.address is None:
        raise UserError(
            f"role={config.role} with channel=redis needs the address of a Redis: channel.address=host:port, and "
            "channel.secret_file"
        )
    return RedisAddress(
        address=channel.address,
        username=channel.username,
        password=read_secret_file(channel.secret_file, "channel.secret_file"),
        tls=channel.tls,
        ca_file=channel.ca_file,
        cert_file=channel.cert_file,
        key_file=channel.key_file,
    )


def store_id(config: TrainConfig, plane: ControlPlane) -> str:
    """Names the run's store within a Mooncake, which another run of the same name may share."""
    return f"{run_id(config)}.{plane.log.nonce()}"


def shared_store(config: TrainConfig, plane: ControlPlane, *, retain: bool = False) -> FeatureStore:
    """The store that producers and trainers of a disaggregated run share."""
    store = config.store
    if store.kind == "shared_dir":
        root = shared_dir_root(store, config.channel.path)
        return SharedDirFeatureStore(root, retain=retain, capacity_bytes=store.capacity_bytes, secret=read_secret(store))
    if store.address is None:
        raise UserError(
            f"role={config.role} with store=mooncake needs the address of a Mooncake master: store.address=host:port"
        )
    if store.secret_file is not None:
        raise UserError(
            "store.secret_file guards store=shared_dir; Mooncake has no authentication: fence its network instead, see "
            "docs/mooncake.md"
        )
    return MooncakeFeatureStore(
        store_id(config, plane),
        master_address=store.address,
        client_address=store.client_address,
        metrics_address=store.metrics_address,
        protocol=store.protocol,
        rdma_devices=store.rdma_devices,
        local_hostname=store.hostname,
        zero_copy=store.zero_copy,
        retain=retain,
        capacity_bytes=store.capacity_bytes,
    )


def shared_dir_root(store: StoreConfig, channel_path: str) -> str | Path:
    """The folder of store=shared_dir of a disaggregated run."""
    return store.root or Path(channel_path) / "features"


def watermarks(topology: TopologyConfig, store: StoreConfig) -> Watermarks:
    """Bounds on what is in flight. Raises UserError when they contradict each other or the store."""
    capacity = store.capacity_bytes or UNLIMITED_BYTES
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


def make_source(parts: "Builder") -> RefSource:
    """Where the trainer's references come from."""
    config = parts.config
    name, store, topology = config.topology.name, config.store, config.topology
    if name == "offline":
        source = OfflineSource(parts.offline_folder(), secret=read_secret(store))
        parts.check_prompts(source.card, str(source.folder))
        return source
    _check_one_engine(config)
    if name == "online" and config.control.kind == "noop":
        return OnlineSource(
            parts.prompts[0],
            parts.target,
            MemoryFeatureStore(store.capacity_bytes),
            plane=control_plane(config),
            capture_batch_size=config.target.capture_batch_size,
        )
    if name in ("online", "interleaved"):
        return ColocatedSource(
            parts.prompts[0],
            parts.target,
            control_plane(config),
            MemoryFeatureStore(store.capacity_bytes),
            watermarks(topology, store),
            seed=config.seed,
            capture_batch_size=config.target.capture_batch_size,
            threaded=name == "interleaved",
            idle_timeout_s=topology.idle_timeout_s,
        )
    options: dict[str, Any] = {"start_timeout_s": topology.start_timeout_s, "idle_timeout_s": topology.idle_timeout_s}
    retain = name == "disagg_offline"
    if not retain:
        options |= {"release_at": topology.release_at, "watermarks": watermarks(topology, store)}
    features = shared_store(config, parts.plane, retain=retain)
    streaming = (ManifestSource if retain else StreamingSource)(parts.plane, features, **options)
    parts.check_prompts(streaming.card, streaming.plane.log.name)
    return streaming


def _check_one_engine(config: TrainConfig) -> None:
    """The SGLang server that a trainer starts for itself takes the first GPUs, so a second rank would find them taken."""
    ranks = num_processes(config.trainer) // (config.trainer.get("num_nodes") or 1)
    if config.target.engine == "sglang" and not is_disaggregated(config) and ranks > 1:
        raise UserError(
            f"target.engine=sglang shares a machine with one trainer process, not {ranks}: set trainer.devices=1, or use "
            "target.engine=sglang_server with topology=disagg_online"
        )


def make_workers(parts: "Builder", name: str) -> list[RolloutWorker]:
    """The producers of this process: as many as its target can capture for at a time.

    Loading takes minutes, so the run is told of it: one that ends meanwhile stays until this process knows.
    """
    config = parts.config
    served = config.target.engine == "sglang_server"
    names, planes = [f"{name}-0" if served else name], [parts.plane]
    heartbeat = Heartbeat(planes[0].ledger, names[0], lambda: "loading")
    try:
        feed = make_feed(parts)
        if isinstance(feed, ServedFeed):
            names += [f"{name}-{index}" for index in range(1, feed.target.num_requests)]
        for _ in names[1:]:
            planes.append(control_plane(config))
            parts.resources.callback(planes[-1].close)
        workers = [
            RolloutWorker(
                one,
                feed,
                plane,
                parts.shared_store,
                watermarks(config.topology, config.store),
                group=config.target.capture_batch_size,
                lease_s=config.topology.lease_s,
                peer_timeout_s=config.topology.start_timeout_s,
            )
            for one, plane in zip(names, planes, strict=True)
        ]
    except BaseException as error:
        heartbeat.stop(f"could not start: {str(error) or type(error).__name__}")
        raise
    heartbeat.stop("loaded")
    return workers


def make_feed(parts: "Builder") -> Feed:
    """What the producers of a topology put into the store."""
    config = parts.config
    if config.topology.name == "disagg_online":
        target = parts.target
        if config.target.engine == "sglang_server":
            assert isinstance(target, ReferenceEngine), "its servers put features into the run's store"
            return ServedFeed(parts.prompts[0], target, seed=config.seed, run_id=run_id(config))
        return PromptFeed(parts.prompts[0], target, seed=config.seed, run_id=run_id(config))
    source = OfflineSource(parts.offline_folder())
    return FolderFeed(source, vocab_size=parts.module.target_info.vocab_size, run_id=run_id(config))


def read_secret(store: StoreConfig) -> str | None:
    """The secret of store=shared_dir."""
    return read_secret_file(store.secret_file, "store.secret_file")
