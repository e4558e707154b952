"""Rules that settings must keep to together. What a field alone allows stands in `schema`."""

import re
from collections.abc import Mapping
from typing import Any

from lightning_dataflow.config.schema import TOPOLOGIES, DataConfig, TrainConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.control.leases import Watermarks

TRAINER = re.compile(r"lightning\.(pytorch\.)?(trainer\.)*Trainer|lightning_dataflow\.DataFlowTrainer")
"""What `trainer._target_` may say; a DataFlowTrainer is built for each."""
DERIVED_ARGUMENTS = {
    "max_epochs": "trainer.max_steps, or trainer.max_steps=null data.num_passes=…",
    "limit_train_batches": "trainer.max_steps",
    "accumulate_grad_batches": "data.global_batch_size and data.micro_batch_size",
    "num_sanity_val_steps": "evaluate.every_n_steps",
    "default_root_dir": "run_name",
}
"""Arguments of the Trainer that follow from settings, and from which."""

SHARE_OF_CAPACITY = 0.8
"""What may be in flight: a store that is nearly full has room, but not in one piece."""
UNLIMITED_BYTES = 1 << 40


def watermarks(config: TrainConfig) -> Watermarks:
    """Bounds on what is in flight. Raises UserError when they contradict each other or the store."""
    topology, capacity = config.topology, config.store.capacity_bytes or UNLIMITED_BYTES
    high = int(SHARE_OF_CAPACITY * capacity) if topology.high_bytes is None else topology.high_bytes
    if high > capacity:
        raise UserError(
            f"topology.high_bytes={high} is more than store.capacity_bytes={capacity}: lower it, or raise the capacity"
        )
    return Watermarks(
        high_bytes=high,
        high_refs=topology.high_refs,
        low_bytes=high * 3 // 4 if topology.low_bytes is None else topology.low_bytes,
        low_refs=topology.high_refs * 3 // 4 if topology.low_refs is None else topology.low_refs,
    )


def check_topology(config: TrainConfig) -> None:
    """Raise UserError for a store, ledger, log, engine or role that does not fit the topology."""
    name, engine = config.topology.name, config.target.engine
    for group, kinds in TOPOLOGIES[name].items():
        if (kind := getattr(config, group).kind) not in kinds:
            raise UserError(f"topology={name} does not work with {group}={kind}: use {group}={' or '.join(kinds)}")
    if (config.channel.kind == "redis") != (config.control.kind == "redis"):
        raise UserError(
            f"channel={config.channel.kind} does not work with control={config.control.kind}: one transaction writes log "
            "and ledger, so set both to redis, or neither"
        )
    if engine == "sglang_server" and name != "disagg_online":
        raise UserError(
            f"target.engine=sglang_server puts features into the store of topology=disagg_online, which topology={name} "
            "does not have: use target.engine=sglang or hf, or that topology"
        )
    _check_release(config)
    if config.topology.is_disaggregated:
        _check_services(config)
    elif config.role != "auto":
        raise UserError(
            f"topology={name} runs in one process, so role={config.role} has no meaning: use topology=disagg_online"
        )


def _check_release(config: TrainConfig) -> None:
    if config.topology.release_at != "durable":
        return
    if config.topology.name != "disagg_online":
        raise UserError(
            f"with topology={config.topology.name}, features do not outlive their step or their process, so "
            "topology.release_at=durable has no meaning: leave it out, or use topology=disagg_online"
        )
    if config.topology.high_bytes is None and config.store.capacity_bytes is None:
        raise UserError(
            "topology.release_at=durable must know how much the store may hold: set topology.high_bytes, or "
            "store.capacity_bytes"
        )


def _check_services(config: TrainConfig) -> None:
    """A supervisor starts the services that are not given; a process started by hand needs their addresses."""
    watermarks(config).check_window(config.data.global_batch_size, 0)
    needs_redis = config.channel.kind == "redis" and config.channel.address is None
    if needs_redis and config.role != "auto":
        raise UserError(
            f"role={config.role} with channel=redis needs the address of a Redis: channel.address=host:port, and "
            "channel.secret_file"
        )
    if config.store.kind != "mooncake":
        return
    if config.store.secret_file is not None:
        raise UserError(
            "store.secret_file guards store=shared_dir; Mooncake has no authentication: fence its network instead, see "
            "docs/mooncake.md"
        )
    if config.store.address is None and config.role != "auto":
        raise UserError(
            f"role={config.role} with store=mooncake needs the address of a Mooncake master: store.address=host:port"
        )
    if config.store.address is None and config.store.capacity_bytes is None:
        raise UserError("store.capacity_bytes=null: a Mooncake that starts on this machine needs to know its size")


def check_training(config: TrainConfig) -> None:
    """Raise UserError for what a trainer would refuse or not read, before anything is captured or started."""
    trainer = config.trainer
    if (target := trainer.get("_target_")) is not None and not TRAINER.fullmatch(target):
        raise UserError(
            f"trainer._target_={target}: the Trainer is always Lightning's, so leave lightning.Trainer and set its "
            "arguments, or use your own in a script (recipes/plain_lightning)"
        )
    for name, instead in DERIVED_ARGUMENTS.items():
        if trainer.get(name) is not None:
            raise UserError(f"trainer.{name}={trainer[name]}: this follows from other settings, use {instead}")
    for setting, entry in _entries(config).items():
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise UserError(f"{setting} names no class, so nothing reads it: set {setting}._target_=…, or ~{setting}")
    _check_monitors(config)
    _check_length(config.data, trainer.get("max_steps"))
    if config.data.row_tokens is not None and config.data.row_tokens < config.data.max_length:
        raise UserError(
            f"data.max_length={config.data.max_length} is more than data.row_tokens={config.data.row_tokens}: a sample "
            "might not fit into a row, so lower the one or raise the other"
        )


def logger_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Loggers by the setting that names each; the group holds one, or several by name."""
    return {"logger": config} if "_target_" in config else {f"logger.{name}": entry for name, entry in config.items()}


def _entries(config: TrainConfig) -> dict[str, Any]:
    """What must name a class, by setting."""
    entries = {f"callbacks.{name}": entry for name, entry in (config.callbacks or {}).items()}
    entries |= logger_entries(config.logger or {})
    if isinstance(strategy := config.trainer.get("strategy"), dict):
        entries["trainer.strategy"] = strategy
    return entries


def _check_monitors(config: TrainConfig) -> None:
    """A callback that follows a measurement needs one that is repeated."""
    entries = config.callbacks or {}
    repeated = "acceptance" in entries and config.evaluate.every_n_steps > 0
    for name, entry in entries.items():
        if str(entry.get("monitor", "")).startswith("val/") and not repeated:
            raise UserError(
                f"callbacks.{name} follows {entry['monitor']}, which is measured before and after training only: set "
                "evaluate.every_n_steps"
            )


def _check_length(data: DataConfig, max_steps: int | None) -> None:
    """Exactly one setting says when training ends."""
    if max_steps is not None and data.num_passes is not None:
        raise UserError(
            f"trainer.max_steps={max_steps} and data.num_passes={data.num_passes} both say when training ends: set one "
            "of them to null"
        )
    if max_steps is None and data.num_passes is None:
        raise UserError("neither trainer.max_steps nor data.num_passes says when training ends: set one of them")
    if max_steps is not None and max_steps < 1:
        raise UserError(f"trainer.max_steps={max_steps}: a stream has no end of its own, give at least 1 step")
    if max_steps is None and data.row_tokens is not None:
        raise UserError(
            f"data.num_passes={data.num_passes} with data.row_tokens={data.row_tokens}: how many samples fill a step of "
            "packed rows shows while training only, so set trainer.max_steps instead"
        )
