"""One machine: start the parts of a disaggregated run, forward what they print, and end all of them together."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from lightning_dataflow.app.ranks import num_processes
from lightning_dataflow.app.schema import TrainConfig
from lightning_dataflow.app.topologies import watermarks
from lightning_dataflow.contracts import PeerFailedError, UserError
from lightning_dataflow.control import SqliteMetadataStore
from lightning_dataflow.control.heartbeat import check_no_other_trainer
from lightning_dataflow.control.plane import LEDGER
from lightning_dataflow.leash import leashed_command
from lightning_dataflow.stores import LocalMooncake

POLL_S = 0.05
FIRST_FAILURE_S = 1.0
"""A part that fails can make others fail; the first in the order of starting is the cause."""
INTERRUPT_S, TERMINATE_S = 5.0, 2.0
PRODUCERS_END_S = 30.0


class Part:
    """A process of the run, in a process group of its own, that dies with this process.

    Its lines are printed with its name in front, except one that begins with `error: `, which is kept.
    """

    def __init__(self, name: str, arguments: Sequence[str], num_threads: int):
        self.name = name
        self.error: str | None = None
        # Idle threads that spin keep the other parts from their cores.
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            leashed_command([sys.executable, "-m", "lightning_dataflow", "train", *arguments]),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdout is not None, "it was asked for"
        self._forward = threading.Thread(target=self._forward_lines, args=(self.process.stdout,), daemon=True)
        self._forward.start()

    def signal(self, number: signal.Signals) -> None:
        """Send `number` to the part and all processes it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def is_running(self) -> bool:
        """Whether any process of the part is there."""
        if self.process.poll() is None:
            return True
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def drain(self) -> None:
        """Wait for its last lines."""
        self._forward.join(TERMINATE_S)

    def _forward_lines(self, pipe: IO[bytes]) -> None:
        line = b""
        while chunk := os.read(pipe.fileno(), 1 << 16):
            for piece in chunk.splitlines(keepends=True):
                line += piece
                if line.endswith((b"\n", b"\r")):
                    self._show(line.decode(errors="replace"))
                    line = b""
        if line:
            self._show(line.decode(errors="replace") + "\n")

    def _show(self, line: str) -> None:
        if line.startswith("error: "):
            self.error = line.removeprefix("error: ").strip()
        elif line.strip():
            sys.stdout.write(f"[{self.name}] {line}")
            sys.stdout.flush()


def supervise(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Run all parts and return when the trainer is done.

    Args:
        arguments: of this command, to which each part's own are added.

    Raises:
        PeerFailedError: a part ended with an error; the others have been ended.
        KeyboardInterrupt: Ctrl-C; all have been ended.
    """
    _check(config)
    signal.signal(signal.SIGTERM, _terminate)
    with ExitStack() as stack:
        settings = [*_without(arguments, "role", "run_name", "num_threads"), f"run_name={_quoted(config.run_name)}"]
        settings += [f"channel.path={_quoted(str(Path(config.channel.path).absolute()))}"]
        mooncake = _start_mooncake(config, stack)
        if mooncake is not None:
            settings += [
                f"store.address={mooncake.master_address}",
                f"store.client_address={mooncake.client_address}",
                f"store.metrics_address={mooncake.metrics_address}",
                f"store.capacity_bytes={mooncake.capacity_bytes}",
            ]
        parts: list[Part] = []
        stack.callback(_end_all, parts)
        threads = _num_threads(config)
        settings.append(f"num_threads={threads}")
        for name in _producers(config):
            folder = Path(config.run_dir) / name
            parts.append(Part(name, [*settings, "role=producer", f"hydra.run.dir={_quoted(str(folder))}"], threads))
        folder = Path(config.run_dir)
        parts.append(Part("trainer", [*settings, "role=trainer", f"hydra.run.dir={_quoted(str(folder))}"], threads))
        _watch(parts, mooncake)


def _terminate(number: int, frame: object) -> None:
    """SIGTERM ends the run as Ctrl-C does."""
    raise KeyboardInterrupt


def _watch(parts: Sequence[Part], mooncake: LocalMooncake | None) -> None:
    """Until the trainer and then the producers have ended. Raises PeerFailedError for one that failed."""
    *producers, trainer = parts
    deadline: float | None = None
    while any(part.process.poll() is None for part in parts):
        if mooncake is not None and (dead := mooncake.poll()) is not None:
            raise PeerFailedError(f"{dead[0]} ended with status {dead[1]}, see {mooncake.log_path(dead[0])}")
        if any(part.process.poll() for part in parts):
            time.sleep(FIRST_FAILURE_S)
            break
        if trainer.process.poll() == 0:
            deadline = deadline or time.monotonic() + PRODUCERS_END_S
            if time.monotonic() > deadline:
                waiting = ", ".join(part.name for part in producers if part.process.poll() is None)
                raise PeerFailedError(f"{waiting} did not end within {PRODUCERS_END_S:.0f} s of the trainer's end")
        time.sleep(POLL_S)
    for part in parts:
        if part.process.poll():
            part.drain()
            raise PeerFailedError(f"{part.name}: {part.error or _how_it_ended(part.process.returncode)}")
    for part in parts:
        part.drain()


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name} (SIGKILL is also what the system sends when memory runs out)"
    return f"ended with status {status}, see above"


def _end_all(parts: Sequence[Part]) -> None:
    """Interrupt what still runs, so that it can free what it holds; then be less polite."""
    for number, patience_s in ((signal.SIGINT, INTERRUPT_S), (signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, TERMINATE_S)):
        running = [part for part in parts if part.is_running()]
        for part in running:
            part.signal(number)
        deadline = time.monotonic() + patience_s
        while any(part.is_running() for part in running) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    for part in parts:
        part.drain()


def _start_mooncake(config: TrainConfig, stack: ExitStack) -> LocalMooncake | None:
    if config.store.kind != "mooncake" or config.store.address is not None:
        return None
    assert config.store.capacity_bytes is not None, "checked"
    logs = Path(config.run_dir) / "mooncake"
    mooncake = LocalMooncake(capacity_bytes=config.store.capacity_bytes, log_dir=logs, warm=True)
    stack.callback(mooncake.close)
    print(f"Mooncake at {mooncake.master_address}, logs in {logs}", flush=True)
    return mooncake


def _check(config: TrainConfig) -> None:
    if config.topology.num_producers < 1:
        raise UserError(f"topology.num_producers={config.topology.num_producers}: a run needs at least one")
    if (ledger := Path(config.channel.path) / LEDGER).is_file():
        check_no_other_trainer(SqliteMetadataStore(ledger), config.run_name)
    marks = watermarks(config.topology, config.store)
    marks.check_window(config.data.global_batch_size, 0)
    if config.store.kind == "mooncake" and config.store.address is None and config.store.capacity_bytes is None:
        raise UserError("store.capacity_bytes=null: a Mooncake that starts on this machine needs to know its size")


def _producers(config: TrainConfig) -> list[str]:
    """One ingests files; more would read the same ones."""
    count = config.topology.num_producers if config.topology.name == "disagg_online" else 1
    return [f"producer-{index}" for index in range(count)]


def _num_threads(config: TrainConfig) -> int:
    processes = len(_producers(config)) + num_processes(config.trainer)
    return config.num_threads or max(1, (os.cpu_count() or 1) // processes)


def _without(arguments: Sequence[str], *names: str) -> list[str]:
    return [one for one in arguments if one.lstrip("+").partition("=")[0] not in names]


def _quoted(value: str) -> str:
    """For Hydra's grammar, which takes some characters of paths for its own."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
