"""A Mooncake of one run: a master and a storage process."""

import ctypes
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Self

from lightning_dataflow.contracts import UserError
from lightning_dataflow.services.server import HOST, LocalServer, free_port, start_together
from lightning_dataflow.stores.mooncake.admin import MooncakeAdmin
from lightning_dataflow.stores.mooncake.client import MooncakeClient, listens
from lightning_dataflow.stores.mooncake.library import INSTALL, TRANSFER_SETTINGS

SMALLEST_CAPACITY = 16 << 20
CLIENT_PAUSE_S = 8.0
WARM_BLOCK = 16 << 20


class MooncakeMaster(LocalServer):
    """`mooncake_master`, which knows where each object is."""

    name = "mooncake_master"

    def choose_ports(self) -> None:
        super().choose_ports()
        self.metrics_port = free_port()
        self.admin = MooncakeAdmin(f"{HOST}:{self.metrics_port}")

    def command(self) -> list[str]:
        return [
            find_program(self.name),
            f"--rpc_address={HOST}",
            f"--rpc_port={self.port}",
            f"--metrics_host={HOST}",
            f"--metrics_port={self.metrics_port}",
            # A writer that dies leaves a half-written object: forget it after 5 s, use its space again after 15 s.
            "--put_start_discard_timeout_sec=5",
            "--put_start_release_timeout_sec=15",
        ]

    def is_ready(self) -> bool:
        return listens(self.address) and self.admin.is_ready()


class MooncakeStorage(LocalServer):
    """`mooncake_client`, which holds the objects.

    It must be dead for CLIENT_PAUSE_S before it is started again: processes that use its shared memory notice by a call
    that fails, which takes the library 4.3 s, and only then register their memory with the next one.
    """

    name = "mooncake_client"
    restart_pause_s = CLIENT_PAUSE_S

    def __init__(self, log_path: Path, capacity_bytes: int, master: MooncakeMaster):
        super().__init__(log_path)
        self.environment = TRANSFER_SETTINGS | os.environ
        self.needs = self._master = master
        self._capacity_bytes = capacity_bytes

    def command(self) -> list[str]:
        return [
            find_program(self.name),
            f"--host={HOST}",
            f"--port={self.port}",
            f"--global_segment_size={self._capacity_bytes}",
            f"--master_server_address={self._master.address}",
            "--metadata_server=P2PHANDSHAKE",
            "--protocol=tcp",
            "--threads=2",
        ]

    def is_ready(self) -> bool:
        # A master whose port was taken reports itself ready once before it exits. One that knows our segment is ours.
        return listens(self.address) and self._master.admin.gauge("master_total_capacity_bytes") > 0


class LocalMooncake:
    """Runs `mooncake_master` and `mooncake_client` on free ports of 127.0.0.1; a context manager.

    Both die with this process, however it ends: start it from a thread that lives as long as they should. The transfer
    ports that `mooncake_client` opens by itself are on all interfaces and ask for no password: see docs/mooncake.md.

    Args:
        capacity_bytes: memory for samples. Only pages that were ever used are taken from the machine.
        log_dir: for `mooncake_master.log` and `mooncake_client.log`.
        warm: use all pages once now, so that a machine with too little memory shows it at the start (2.5 s per GB).

    Attributes:
        master, storage: the two servers. Restarted ones have lost their data; connections find them again within 3 s.

    Raises:
        UserError: Mooncake is not installed, or a server was not ready in time.
    """

    def __init__(self, *, capacity_bytes: int, log_dir: str | Path, warm: bool = False):
        if capacity_bytes < SMALLEST_CAPACITY:
            raise UserError(f"store.capacity_bytes is {capacity_bytes}, Mooncake needs at least {SMALLEST_CAPACITY}")
        self.capacity_bytes = capacity_bytes
        self.master = MooncakeMaster(Path(log_dir) / "mooncake_master.log")
        self.storage = MooncakeStorage(Path(log_dir) / "mooncake_client.log", capacity_bytes, self.master)
        self.servers = (self.master, self.storage)
        try:
            start_together(self.servers)
            self.master_address, self.metrics_address = self.master.address, self.master.admin.address
            self.client_address = self.storage.address
            if warm:
                self._warm()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop both; their data is gone. Does nothing the second time."""
        for server in reversed(self.servers):
            server.close()

    def _warm(self) -> None:
        client = MooncakeClient(master_address=self.master_address, client_address=self.client_address)
        block = client.lease(WARM_BLOCK)
        keys: list[str] = []
        size = WARM_BLOCK
        while size >= 1 << 16:
            keys.append(f"warm/{len(keys)}")
            if client.put([keys[-1]], [ctypes.addressof(block)], [size])[0]:
                size //= 2
        client.remove(keys)
        client.close()


def find_program(name: str) -> str:
    """Path of one of Mooncake's programs: beside this Python, on PATH, or in the package."""
    package = importlib.util.find_spec("mooncake")
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    places += list(package.submodule_search_locations or []) if package else []
    program = shutil.which(name, path=os.pathsep.join(places))
    if program is None:
        raise UserError(f"{name} is not installed: {INSTALL}")
    return program
