"""One machine: start the parts of a disaggregated run, forward what they print, and end all of them together."""

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lightning_dataflow.callbacks.result import write_result
from lightning_dataflow.config.derived import run_id
from lightning_dataflow.config.parsing import quoted
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import PeerFailedError
from lightning_dataflow.control import ControlPlane, resolve_control_plane
from lightning_dataflow.control.heartbeat import SUPERVISOR, Heartbeat, check_no_other_trainer
from lightning_dataflow.run.ranks import num_processes
from lightning_dataflow.run.streams import redis_address
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.services.redis import LocalRedis
from lightning_dataflow.supervise.processes import Part, end_all, interrupts_wait, without
from lightning_dataflow.supervise.watch import Restarts, Watch

PATIENCE_S = 2.0
"""For a Redis that went away: who waits longer cannot start it again."""


def supervise(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Run all parts and return when the trainer is done.

    Args:
        arguments: of this command, to which each part's own are added.

    Raises:
        PeerFailedError: parts failed and the run cannot go on without them; the others have been ended.
        KeyboardInterrupt: Ctrl-C or SIGTERM; all have been ended.
    """
    with ExitStack() as stack:
        settings = [*without(arguments, "role", "run_name", "num_threads"), f"run_name={quoted(config.run_name)}"]
        settings += [f"channel.path={quoted(str(Path(config.channel.path).absolute()))}"]
        redis = _start_redis(config, stack)
        if redis is not None:
            config.channel.address, config.channel.secret_file = redis.where.address, str(redis.secret_file.absolute())
            settings += [
                f"channel.address={config.channel.address}",
                f"channel.secret_file={quoted(config.channel.secret_file)}",
            ]
        plane = _control_plane(config)
        stack.callback(plane.close)
        check_no_other_trainer(plane.ledger, config.run_name)
        mooncake = _start_mooncake(config, stack)
        if mooncake is not None:
            settings += [
                f"store.address={mooncake.master_address}",
                f"store.client_address={mooncake.client_address}",
                f"store.metrics_address={mooncake.metrics_address}",
                f"store.capacity_bytes={mooncake.capacity_bytes}",
            ]
        restarts = Restarts(config.topology.restarts)
        stack.push(partial(_complete_result, Path(config.run_dir) / "result.json", restarts, time.time()))
        parts: list[Part] = []
        stack.callback(end_all, parts)
        threads = _num_threads(config)
        settings.append(f"num_threads={threads}")
        for name in _producers(config):
            folder = Path(config.run_dir) / name
            arguments = [*settings, "role=producer", f"hydra.run.dir={quoted(str(folder))}"]
            with interrupts_wait():
                parts.append(Part(name, arguments, threads, signal.SIGKILL))
        folder = Path(config.run_dir)
        arguments = [*settings, "role=trainer", f"hydra.run.dir={quoted(str(folder))}"]
        with interrupts_wait():
            parts.append(Part("trainer", arguments, threads, signal.SIGINT))
        *producers, trainer = parts
        servers = [*([redis] if redis else []), *(mooncake.servers if mooncake else [])]
        watch = Watch(producers, trainer, servers, plane.ledger, Path(config.run_dir), restarts)
        heartbeat = Heartbeat(plane.ledger, SUPERVISOR, watch.describe)
        stack.callback(heartbeat.stop, "ended")
        watch.run()


def _complete_result(
    path: Path, restarts: Restarts, since: float, kind: object, error: BaseException | None, trace: object
) -> None:
    """The trainer, which writes its result, knows neither of restarts nor of the error for which it was interrupted."""
    if not path.is_file() or path.stat().st_mtime < since:
        return
    result = json.loads(path.read_text()) | {"restarts": restarts.counts}
    if isinstance(error, PeerFailedError) and result["status"] != "completed":
        result["status"] = f"failed: {error}"
    write_result(path, result)


def _control_plane(config: TrainConfig) -> ControlPlane:
    if config.channel.kind == "redis":
        where = redis_address(config.channel)
        return resolve_control_plane("disaggregated", run_id(config.run_name), redis=where, patience_s=PATIENCE_S)
    return resolve_control_plane("disaggregated", run_id(config.run_name), path=config.channel.path)


def _start_redis(config: TrainConfig, stack: ExitStack) -> LocalRedis | None:
    if config.channel.kind != "redis" or config.channel.address is not None:
        return None
    redis = LocalRedis(config.channel.path)
    stack.callback(redis.close)
    print(f"Redis at {redis.where.address}, files in {config.channel.path}", flush=True)
    return redis


def _start_mooncake(config: TrainConfig, stack: ExitStack) -> LocalMooncake | None:
    if config.store.kind != "mooncake" or config.store.address is not None:
        return None
    assert config.store.capacity_bytes is not None, "checked"
    logs = Path(config.run_dir) / "mooncake"
    mooncake = LocalMooncake(capacity_bytes=config.store.capacity_bytes, log_dir=logs, warm=True)
    stack.callback(mooncake.close)
    print(f"Mooncake at {mooncake.master_address}, logs in {logs}", flush=True)
    return mooncake


def _producers(config: TrainConfig) -> list[str]:
    """One ingests files; more would read the same ones."""
    count = config.topology.num_producers if config.topology.name == "disagg_online" else 1
    return [f"producer-{index}" for index in range(count)]


def _num_threads(config: TrainConfig) -> int:
    processes = len(_producers(config)) + num_processes(config.trainer)
    return config.num_threads or max(1, (os.cpu_count() or 1) // processes)
