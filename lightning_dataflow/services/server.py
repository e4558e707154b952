"""A server that a run starts on this machine, and ends."""

import os
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import without_advice
from lightning_dataflow.contracts.waiting import wait_until
from lightning_dataflow.services.leash import leashed_command

HOST = "127.0.0.1"
START_ATTEMPTS = 3
START_TIMEOUT_S = 30.0
POLL_S = 0.05
LAST_BYTES = 1 << 20
"""Of a log, among which its last words are looked for."""


class ServerExitedError(UserError):
    """A server ended while it was starting."""


class LocalServer(ABC):
    """One program in a process group of its own, on a free port of 127.0.0.1; a context manager.

    It dies with this process, however that ends: start it from a thread that lives as long as it should.

    Attributes:
        name: for messages.
        log_path: where its output is appended; only the owner may read it.
        port: the same after a restart.
        process: None before the first start.
        death_signal: what it gets when this process is gone.
        stop_timeout_s: how long it may take to end after SIGTERM.
        restart_pause_s: how long it must have been dead before it is started again.
        keeps_data: whether it has its data again after a restart.
        environment: its environment variables.
        inherited_files: descriptors of this process that it keeps open.
        needs: another server, without which it never becomes ready.
    """

    name: str
    death_signal = signal.SIGKILL
    stop_timeout_s = 2.0
    restart_pause_s = 0.0
    keeps_data = False
    environment: Mapping[str, str] = os.environ
    inherited_files: tuple[int, ...] = ()
    needs: "LocalServer | None" = None
    process: subprocess.Popen[bytes] | None = None

    def __init__(self, log_path: Path):
        self.log_path = log_path
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.choose_ports()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def command(self) -> list[str]:
        """The command line."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it answers requests. A UserError or OSError says that it does not yet."""

    def standard_input(self) -> str:
        """What it reads when it starts: settings or secrets that no command line should show."""
        return ""

    def choose_ports(self) -> None:
        """Choose free ports. Another process may take one before the server does."""
        self.port = free_port()

    @property
    def address(self) -> str:
        """host:port."""
        return f"{HOST}:{self.port}"

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it, or start it again at the same address, and wait until it is ready.

        Raises:
            ServerExitedError: it ended.
            UserError: it was not ready in time.
        """
        with open_private(self.log_path, "ab") as log:
            self._log_start = log.tell()
            self.process = start_process(
                self.command(),
                self.death_signal,
                stdin=subprocess.PIPE,
                stdout=log,
                env=self.environment,
                pass_fds=self.inherited_files,
            )
        assert self.process.stdin is not None, "a pipe"
        with suppress(BrokenPipeError), self.process.stdin as pipe:  # it may have ended already
            pipe.write(self.standard_input().encode())
        if not wait_until(self._answers, timeout_s, POLL_S, f"{self.name} to start, see {self.log_path}"):
            raise UserError(f"{self.name} was not ready within {timeout_s:g} s, {self._last_words()}")

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        assert self.process is not None, "it was started"
        return self.process.poll()

    def stop(self) -> None:
        """End it and every process that it started."""
        if self.process is not None:
            end_process(self.process, self.stop_timeout_s)

    def close(self) -> None:
        """Stop it and free what else it holds. Does nothing the second time."""
        self.stop()

    def _answers(self) -> bool:
        for server in (self.needs, self):
            if server is not None and (status := server.poll()) is not None:
                raise ServerExitedError(f"{server.name} ended with status {status}, {server._last_words()}")
        try:
            return self.is_ready()
        except (UserError, OSError):
            return False

    def _last_words(self) -> str:
        """The last error in the log since the latest start, otherwise the last lines."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, self.log_path.stat().st_size - LAST_BYTES))
            text = log.read(LAST_BYTES).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return f"see {self.log_path}: {without_advice(' | '.join(errors[-1:] or lines[-4:])) or 'empty'}"


def start_together(servers: Sequence[LocalServer], timeout_s: float = START_TIMEOUT_S) -> None:
    """Start servers one after the other. If one ends, its port was probably taken: try again on other ports."""
    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            for server in servers:
                server.start(timeout_s)
            return
        except ServerExitedError:
            if not attempts_left:
                raise
            for server in servers:
                server.stop()
                server.choose_ports()


def start_process(command: list[str], death_signal: signal.Signals, **options: Any) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own. It gets `death_signal` when this process is gone.

    Args:
        options: for `subprocess.Popen`. Errors go where the output goes.
    """
    return subprocess.Popen(
        leashed_command(command, death_signal), stderr=subprocess.STDOUT, start_new_session=True, **options
    )


def signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to a process and every process that it started; returns whether any is left. Signal 0 only asks."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end_process(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Terminate a process; kill it after `timeout_s`, and whatever is left of its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal_group(process, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)


def free_port() -> int:
    """A port at which no process listens now."""
    with socket.create_server((HOST, 0)) as probe:
        return probe.getsockname()[1]


def open_private(path: Path, mode: str) -> IO[Any]:
    """Open a file that only its owner may read."""
    file: IO[Any] = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    os.fchmod(file.fileno(), 0o600)  # an existing file may have another mode
    return file
