"""A Redis server of one run."""

import secrets
import shutil
import signal
from pathlib import Path
from typing import IO

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.waiting import try_lock, wait_until
from lightning_dataflow.control.redis.address import RedisAddress
from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.services.server import HOST, POLL_S, LocalServer, open_private, start_together

PROGRAM = "redis-server"
INSTALL = (
    "install it (Debian: apt-get install redis-server), or give the address of a running one, channel.address=host:port"
)
LOCK_TIMEOUT_S = 5.0
SECRET, ADDRESS, LOCK = "redis-secret", "redis-address", "redis-lock"
LOG, DATA = "redis.log", "appendonlydir"


class LocalRedis(LocalServer):
    """Runs `redis-server` with a password of its own.

    It writes every change to an append-only file in `folder`; a later one in the same folder starts with that data.

    Args:
        folder: for its data, its log and its password. Only the owner may read log and password.
        settings: further lines of its configuration.

    Raises:
        UserError: redis-server is not installed or does not start, or another process runs one in this folder.
    """

    name = PROGRAM
    death_signal = signal.SIGTERM
    stop_timeout_s = 5.0
    keeps_data = True

    def __init__(self, folder: str | Path, *, settings: tuple[str, ...] = ()):
        if shutil.which(PROGRAM) is None:
            raise UserError(f"{PROGRAM} is not installed: {INSTALL}")
        self.folder = Path(folder)
        super().__init__(self.folder / LOG)
        self.secret_file = self.folder / SECRET
        self._settings = settings
        self._lock = _lock(self.folder / LOCK)
        self.inherited_files = (self._lock.fileno(),)  # locked until this process and the server are gone
        try:
            if not self.secret_file.exists():
                with open_private(self.secret_file, "x") as file:
                    file.write(secrets.token_urlsafe(24))
            start_together([self])
            (self.folder / ADDRESS).write_text(self.address)
        except BaseException:
            self.stop()
            self._lock.close()
            raise

    @property
    def where(self) -> RedisAddress:
        """How to connect."""
        return RedisAddress(address=self.address, password=self.secret_file.read_text())

    def command(self) -> list[str]:
        return [PROGRAM, "-"]

    def standard_input(self) -> str:
        settings = (
            f"bind {HOST}",
            f"port {self.port}",
            f'dir "{self.folder.absolute()}"',
            f"requirepass {self.secret_file.read_text()}",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",
            "hash-max-listpack-entries 32",  # Redis searches a larger listpack from end to end
            *self._settings,
        )
        return "\n".join(settings)

    def is_ready(self) -> bool:
        RedisServer(self.where, "start")
        return True

    def close(self) -> None:
        """Stop it. Its data stays in the append-only file, unless all of it would expire anyway.

        Does nothing the second time.
        """
        if self._lock.closed:
            return
        is_empty = self.poll() is None and self._everything_expires()
        self.stop()
        (self.folder / ADDRESS).unlink(missing_ok=True)
        if is_empty:
            shutil.rmtree(self.folder / DATA, ignore_errors=True)
            self.secret_file.unlink(missing_ok=True)
        self._lock.close()

    def _everything_expires(self) -> bool:
        try:
            server = RedisServer(self.where, "end", patience_s=self.stop_timeout_s)
            return all(server.ask("TTL", key) >= 0 for key in server.ask("KEYS", "*"))
        except (UserError, OSError):
            return False


def _lock(path: Path) -> IO[str]:
    """Two servers must not write the same append-only file."""
    file = path.open("a")
    if not wait_until(lambda: try_lock(file.fileno()), LOCK_TIMEOUT_S, POLL_S, f"the Redis in {path.parent} to end"):
        file.close()
        raise UserError(
            f"another process runs a Redis in {path.parent}: the run goes on, so end it first, or choose another run_name"
        )
    return file
