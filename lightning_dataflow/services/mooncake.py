"""A Mooncake of our own on this machine: one master and one storage process."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from lightning_dataflow.contracts import UserError
from lightning_dataflow.services.leash import leashed_command
from lightning_dataflow.stores.mooncake.client import (
    INSTALL,
    TRANSFER_SETTINGS,
    MooncakeAdmin,
    MooncakeClient,
    StoreUnavailableError,
    listens,
)

HOST = "127.0.0.1"
SMALLEST_CAPACITY = 16 << 20
START_ATTEMPTS = 3
STOP_TIMEOUT_S = 2.0
POLL_INTERVAL_S = 0.02
CLIENT_PAUSE_S = 8.0
WARM_BLOCK = 16 << 20


class LocalMooncake:
    """Runs `mooncake_master` and `mooncake_client` on free ports of 127.0.0.1; a context manager.

    Both die with this process, however it ends: start it from a thread that lives as long as they should. The transfer
    ports that `mooncake_client` opens by itself are on all interfaces and ask for no password: see docs/mooncake.md.

    Args:
        capacity_bytes: memory for samples. Only pages that were ever used are taken from the machine.
        log_dir: for `mooncake_master.log` and `mooncake_client.log`.
        master_port: None for any free one.
        warm: use all pages once now, so that a machine with too little memory shows it at the start (2.5 s per GB).

    Raises:
        UserError: Mooncake is not installed, a part did not start in `start_timeout_s`, or `master_port` is taken.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        log_dir: str | Path,
        master_port: int | None = None,
        start_timeout_s: float = 30.0,
        warm: bool = False,
    ):
        if capacity_bytes < SMALLEST_CAPACITY:
            raise UserError(f"store.capacity_bytes is {capacity_bytes}, Mooncake needs at least {SMALLEST_CAPACITY}")
        if master_port is not None and not _is_free(master_port):
            raise UserError(f"port {master_port} of {HOST} is taken: choose another one, or leave it out")
        self.capacity_bytes = capacity_bytes
        self.log_dir = Path(log_dir)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._programs = {name: find_program(name) for name in ("mooncake_master", "mooncake_client")}
        try:
            self._start(master_port, time.monotonic() + start_timeout_s)
            if warm:
                self._warm()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def poll(self) -> tuple[str, int] | None:
        """Name and exit status of a part that died; None while all run."""
        for name, process in self.processes.items():
            status = process.poll()
            if status is not None:
                return name, status
        return None

    def restart(self, name: str, *, start_timeout_s: float = 30.0) -> None:
        """Start a part that died again, at its address. What it held is gone; clients find it again within 3 s.

        A `mooncake_client` must have been dead for CLIENT_PAUSE_S: processes that use its shared memory notice by a call
        that fails, which takes the library 4.3 s, and only then give their memory to the next one. Call it from a thread
        that lives as long as the part should.

        Raises:
            UserError: it did not start in time, or its port was taken.
        """
        start = {"mooncake_master": self._start_master, "mooncake_client": self._start_client}[name]
        try:
            start(time.monotonic() + start_timeout_s)
        except _PartDiedError as error:
            raise UserError(str(error)) from None

    def log_path(self, name: str) -> Path:
        """Where `mooncake_master` or `mooncake_client` writes."""
        return self.log_dir / f"{name}.log"

    def close(self) -> None:
        """Stop both; what they hold is gone. Does nothing the second time."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, master_port: int | None, deadline: float) -> None:
        for attempt in range(START_ATTEMPTS):
            rpc, metrics, client = _free_ports(3)
            self.master_address, self.metrics_address = f"{HOST}:{master_port or rpc}", f"{HOST}:{metrics}"
            self.client_address = f"{HOST}:{client}"
            try:
                self._start_master(deadline)
                self._start_client(deadline)
                return
            except _PartDiedError as error:  # most likely somebody took a port between the look and the start
                self.close()
                if attempt == START_ATTEMPTS - 1:
                    raise UserError(str(error)) from None

    def _start_master(self, deadline: float) -> None:
        rpc_port, metrics_port = (address.rpartition(":")[2] for address in (self.master_address, self.metrics_address))
        self._spawn(
            "mooncake_master",
            f"--rpc_address={HOST}",
            f"--rpc_port={rpc_port}",
            f"--metrics_host={HOST}",
            f"--metrics_port={metrics_port}",
            # A writer that dies leaves a half-written object: forget it after 5 s, use its space again after 15 s.
            "--put_start_discard_timeout_sec=5",
            "--put_start_release_timeout_sec=15",
        )
        admin = MooncakeAdmin(self.metrics_address)
        self._wait("mooncake_master", lambda: listens(self.master_address) and admin.is_ready(), deadline)

    def _start_client(self, deadline: float) -> None:
        self._spawn(
            "mooncake_client",
            f"--host={HOST}",
            f"--port={self.client_address.rpartition(':')[2]}",
            f"--global_segment_size={self.capacity_bytes}",
            f"--master_server_address={self.master_address}",
            "--metadata_server=P2PHANDSHAKE",
            "--protocol=tcp",
            "--threads=2",
        )
        # A master whose port was taken says that it is ready, once, before it exits. One that knows our segment is ours.
        admin = MooncakeAdmin(self.metrics_address)
        self._wait(
            "mooncake_client",
            lambda: listens(self.client_address) and admin.gauge("master_total_capacity_bytes") > 0,
            deadline,
        )

    def _spawn(self, name: str, *options: str) -> None:
        with self.log_path(name).open("ab" if name in self.processes else "wb") as log:
            self.processes[name] = subprocess.Popen(
                leashed_command([self._programs[name], *options], signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**TRANSFER_SETTINGS, **os.environ},
            )

    def _wait(self, name: str, is_ready: Callable[[], bool], deadline: float) -> None:
        while not self._is_ready(name, is_ready):
            if time.monotonic() > deadline:
                raise UserError(f"{name} is not ready in time{self._last_words(name)}")
            time.sleep(POLL_INTERVAL_S)

    def _is_ready(self, name: str, is_ready: Callable[[], bool]) -> bool:
        for part in (name, "mooncake_master"):  # without a master no client gets ready
            if (status := self.processes[part].poll()) is not None:
                raise _PartDiedError(f"{part} exited with status {status}{self._last_words(part)}")
        try:
            return is_ready()
        except StoreUnavailableError:
            return False

    def _last_words(self, name: str) -> str:
        """One line: where the log is and how it ends."""
        lines = self.log_path(name).read_text(errors="replace").split("\n")
        return f"; {self.log_path(name)} ends: {' | '.join(line.strip() for line in lines[-4:] if line.strip()) or 'empty'}"

    def _warm(self) -> None:
        client = MooncakeClient(master_address=self.master_address, client_address=self.client_address)
        block = client.memory.allocate(WARM_BLOCK)
        keys: list[str] = []
        size = WARM_BLOCK
        while size >= 1 << 16:
            keys.append(f"warm/{len(keys)}")
            if client.put([keys[-1]], [block.address], [size])[0]:
                size //= 2
        client.remove(keys)
        client.memory.free(block)
        client.close()


class _PartDiedError(Exception):
    pass


def find_program(name: str) -> str:
    """Path of one of Mooncake's programs: beside this Python, on PATH, or in the package."""
    package = importlib.util.find_spec("mooncake")
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    places += list(package.submodule_search_locations or []) if package else []
    program = shutil.which(name, path=os.pathsep.join(places))
    if program is None:
        raise UserError(f"{name} is not installed: {INSTALL}")
    return program


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now; somebody may before they are used."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
