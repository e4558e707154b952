"""One machine: start the processes of a disaggregated run, forward what they print, and end all of them together."""

import json
import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lightning_dataflow.callbacks.result import write_result
from lightning_dataflow.config.files import read_date
from lightning_dataflow.config.parsing import quoted
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import PeerFailedError
from lightning_dataflow.control.heartbeat import SUPERVISOR, Heartbeat, check_no_other_trainer
from lightning_dataflow.run.ranks import num_processes
from lightning_dataflow.run.streams import control_plane
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.services.redis import LocalRedis
from lightning_dataflow.services.server import LocalServer
from lightning_dataflow.supervise.processes import ManagedProcess, defer_interrupts, end_all
from lightning_dataflow.supervise.watch import Restarts, Watch

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""For a Redis that does not answer: a supervisor that waits longer cannot restart it."""


def supervise(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Run all processes and return when the trainer is done.

    Args:
        config: the addresses of servers that start here are set in it.
        arguments: of this command; each process gets them, and some of its own.

    Raises:
        PeerFailedError: the run cannot go on without the processes that failed; the others have been ended.
        KeyboardInterrupt: SIGINT or SIGTERM; all have been ended.
    """
    run_dir = Path(config.run_dir)
    restarts = Restarts(config.topology.restarts)
    with ExitStack() as stack:
        servers = _start_redis(config, stack)
        plane = control_plane(config, patience_s=PATIENCE_S)
        stack.callback(plane.close)
        check_no_other_trainer(plane.ledger, config.run_name)
        plane.log.first_day(read_date(config.data.date, run_dir))
        servers += _start_mooncake(config, stack)
        stack.push(partial(_complete_result, run_dir / "result.json", restarts, time.time()))
        processes: list[ManagedProcess] = []
        stack.callback(end_all, processes)
        settings = _shared_settings(config, arguments)
        for name in (*_producers(config), "trainer"):
            with defer_interrupts():
                processes.append(_start(name, settings, config))
        *producers, trainer = processes
        watch = Watch(producers, trainer, servers, plane.ledger, run_dir, restarts)
        heartbeat = Heartbeat(plane.ledger, SUPERVISOR, watch.describe)
        stack.callback(heartbeat.stop, "ended")
        watch.run()


def _start_redis(config: TrainConfig, stack: ExitStack) -> list[LocalServer]:
    channel = config.channel
    if channel.kind != "redis" or channel.address is not None:
        return []
    redis = stack.enter_context(LocalRedis(channel.path))
    channel.address, channel.secret_file = redis.address, str(redis.secret_file.absolute())
    log.info("Redis at %s, files in %s", redis.address, channel.path)
    return [redis]


def _start_mooncake(config: TrainConfig, stack: ExitStack) -> list[LocalServer]:
    store, log_dir = config.store, Path(config.run_dir) / "mooncake"
    if store.kind != "mooncake" or store.address is not None:
        return []
    assert store.capacity_bytes is not None, "checked"
    mooncake = stack.enter_context(LocalMooncake(capacity_bytes=store.capacity_bytes, log_dir=log_dir, warm=True))
    store.address, store.metrics_address = mooncake.master_address, mooncake.metrics_address
    store.client_address = mooncake.client_address
    log.info("Mooncake at %s, logs in %s", mooncake.master_address, log_dir)
    return [*mooncake.servers]


def _complete_result(
    path: Path, restarts: Restarts, since: float, kind: object, error: BaseException | None, trace: object
) -> None:
    """Add what the trainer, which writes its result, cannot know: restarts, and the error for which it was interrupted."""
    if not path.is_file() or path.stat().st_mtime < since:
        return
    result = json.loads(path.read_text()) | {"restarts": restarts.counts}
    if isinstance(error, PeerFailedError) and result["status"] != "completed":
        result["status"] = f"failed: {error}"
    write_result(path, result)


def _shared_settings(config: TrainConfig, arguments: Sequence[str]) -> list[str]:
    """Arguments of all processes. Of two values for a setting, Hydra takes the last."""
    own = {
        "run_name": config.run_name,
        "num_threads": _num_threads(config),
        "channel.path": Path(config.channel.path).absolute(),
        "channel.address": config.channel.address,
        "channel.secret_file": config.channel.secret_file,
        "store.address": config.store.address,
        "store.client_address": config.store.client_address,
        "store.metrics_address": config.store.metrics_address,
    }
    given = [argument for argument in arguments if not argument.startswith("role=")]
    return [*given, *(f"{name}={quoted(value)}" for name, value in own.items() if value is not None)]


def _start(name: str, settings: Sequence[str], config: TrainConfig) -> ManagedProcess:
    role, folder, death_signal = "producer", Path(config.run_dir) / name, signal.SIGKILL
    if name == "trainer":
        role, folder, death_signal = "trainer", Path(config.run_dir), signal.SIGINT
    arguments = [*settings, f"role={role}", f"hydra.run.dir={quoted(folder)}"]
    return ManagedProcess(name, arguments, _num_threads(config), death_signal)


def _producers(config: TrainConfig) -> list[str]:
    """Offline features need exactly one producer; a second would ingest the same files."""
    count = config.topology.num_producers if config.topology.name == "disagg_online" else 1
    return [f"producer-{index}" for index in range(count)]


def _num_threads(config: TrainConfig) -> int:
    processes = len(_producers(config)) + num_processes(config.trainer)
    return config.num_threads or max(1, (os.cpu_count() or 1) // processes)
