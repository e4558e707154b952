"""A Redis of our own on this machine, for one run."""

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control.redis.address import RedisAddress
from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.services.leash import leashed_command

HOST = "127.0.0.1"
PROGRAM = "redis-server"
INSTALL = (
    "install it (Debian: apt-get install redis-server), or give the address of a running one, channel.address=host:port"
)
START_ATTEMPTS = 3
STOP_TIMEOUT_S = 5.0
POLL_S = 0.02
SECRET, ADDRESS, LOCK = "redis-secret", "redis-address", "redis-lock"
LOG, DATA = "redis.log", "appendonlydir"


class LocalRedis:
    """Runs `redis-server` on a free port of 127.0.0.1, with a password of its own; a context manager.

    It writes each change to an append-only file in `folder`, from which it starts again with all that it held. It dies
    with this process, however that ends: start it from a thread that lives as long as it should.

    Args:
        folder: for its data, its log and its password, which nobody else may read.
        port: None for any free one.
        settings: further lines of its configuration.

    Raises:
        UserError: redis-server is not installed, or did not start in `start_timeout_s`.
    """

    def __init__(
        self, folder: str | Path, *, port: int | None = None, settings: tuple[str, ...] = (), start_timeout_s: float = 30.0
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._settings = settings
        self._lock_file = self._lock()
        program = shutil.which(PROGRAM)
        if program is None:
            raise UserError(f"{PROGRAM} is not installed: {INSTALL}")
        self._program = program
        self.secret_file = self.folder / SECRET
        if not self.secret_file.exists():
            file = os.open(self.secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(file, secrets.token_urlsafe(24).encode())
            os.close(file)
        for attempt in range(START_ATTEMPTS):
            self.port = port or _free_port()
            try:
                self.restart(PROGRAM, start_timeout_s=start_timeout_s)
                (self.folder / ADDRESS).write_text(self.where.address)
                return
            except UserError:  # most likely somebody took the port between the look and the start
                self._stop()
                if port is not None or attempt == START_ATTEMPTS - 1:
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def where(self) -> RedisAddress:
        """How to connect."""
        return RedisAddress(address=f"{HOST}:{self.port}", password=self.secret_file.read_text())

    def restart(self, name: str, *, start_timeout_s: float = 30.0) -> None:
        """Start it at its port, with what its append-only file holds. Raises UserError when it is not ready in time."""
        settings = (
            f"bind {HOST}",
            f"port {self.port}",
            f'dir "{self.folder.absolute()}"',
            f'logfile "{self.log_path(name).absolute()}"',
            f"requirepass {self.secret_file.read_text()}",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",
            "hash-max-listpack-entries 32",  # a hash of more is not searched from end to end
            *self._settings,
        )
        self.processes[name] = process = subprocess.Popen(
            leashed_command([self._program, "-"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[self._lock_file],  # held until both of us are gone
        )
        assert process.stdin is not None, "it was asked for"
        process.stdin.write("\n".join(settings).encode())
        process.stdin.close()
        deadline = time.monotonic() + start_timeout_s
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"{PROGRAM} did not start in time; {self.log_path(name)} ends: {self._last_words(name)}")
            time.sleep(POLL_S)

    def log_path(self, name: str) -> Path:
        """Where it writes what it does."""
        return self.folder / LOG

    def close(self) -> None:
        """Stop it. What it holds stays in its append-only file, unless it would itself remove all of that in time.

        Does nothing the second time.
        """
        if PROGRAM not in self.processes:
            return
        empty = self.processes[PROGRAM].poll() is None and self._keeps_nothing()
        self._stop()
        if empty:
            shutil.rmtree(self.folder / DATA, ignore_errors=True)
            self.secret_file.unlink(missing_ok=True)
        os.close(self._lock_file)

    def _stop(self) -> None:
        process = self.processes.pop(PROGRAM)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        (self.folder / ADDRESS).unlink(missing_ok=True)

    def _lock(self) -> int:
        """Two servers would write one append-only file."""
        file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(file)
                    raise UserError(
                        f"another process runs a Redis in {self.folder}: the run goes on, so end it first, or choose "
                        "another run_name"
                    ) from None
            time.sleep(POLL_S)

    def _is_ready(self) -> bool:
        try:
            RedisServer(self.where, "start")
        except (UserError, PermissionError):  # not there yet, loading, or somebody else's
            return False
        return True

    def _keeps_nothing(self) -> bool:
        try:
            server = RedisServer(self.where, "end", patience_s=STOP_TIMEOUT_S)
            return all(server.ask("TTL", key) >= 0 for key in server.ask("KEYS", "*"))
        except (UserError, PermissionError, OSError):
            return False

    def _last_words(self, name: str) -> str:
        try:
            lines = self.log_path(name).read_text(errors="replace").split("\n")
        except OSError:
            return "nothing"
        return " | ".join(line.strip() for line in lines[-4:] if line.strip())


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return probe.getsockname()[1]
