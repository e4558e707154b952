"""Several hosts on one machine: network namespaces on one bridge, each with a private folder."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lightning_dataflow.control.processes import is_running
from lightning_dataflow.services.mooncake import find_program
from lightning_dataflow.services.redis import PROGRAM
from lightning_dataflow.stores.mooncake.library import TRANSFER_SETTINGS
from tests.processes import TRAIN, environment

NETWORK = "10.213.77"
SECRET = "not-to-be-seen"
"""Redis's password. No process may print it."""
READ = "import urllib.request; print(urllib.request.urlopen({url!r}, timeout=5).read().decode())"
_numbers = itertools.count(1)


def why_not() -> str | None:
    """The reason why hosts cannot be made here, or nothing."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and `ip` (Debian: apt-get install iproute2)"
    if shutil.which(PROGRAM) is None:
        return "redis-server is not installed (Debian: apt-get install redis-server)"
    probe = new_name()
    possible = subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None if possible else "network namespaces cannot be made here"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def new_name() -> str:
    """A name for a namespace or a link that is unique to this process and shows its owner."""
    return f"ldf{os.getpid()}-{next(_numbers)}"


def remove_space(name: str) -> None:
    """Kill what runs in a namespace, and remove it."""
    listing = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in listing.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def remove_leftovers() -> None:
    """Remove what a killed process left: namespaces, the processes in them, links and bridges."""
    for name, owner in re.findall(r"^(ldf(\d+)-\d+)", ip("netns", "list"), re.MULTILINE):
        if not is_running(int(owner)):
            remove_space(name)
    for name, owner in re.findall(r"^\d+: (ldf(\d+)-\d+)", ip("-o", "link"), re.MULTILINE):
        if not is_running(int(owner)):
            subprocess.run(["ip", "link", "delete", name], capture_output=True)


class Host:
    """One host, with everything that was started on it."""

    def __init__(self, bridge: str, number: int, folder: Path):
        self.address, self.folder = f"{NETWORK}.{number}", folder
        self.space = self.link = new_name()
        self.started: list[subprocess.Popen[bytes]] = []
        self._files: list[IO[bytes]] = []
        folder.mkdir(parents=True)
        ip("netns", "add", self.space)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        ip("link", "set", self.link, "master", bridge, "up")
        for command in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            ip("-n", self.space, *command.split())

    def start(self, *command: str, output: str = "output.txt", text: str = "") -> subprocess.Popen[bytes]:
        """A command in the background, its output in a file."""
        self._files.append((self.folder / output).open("ab"))
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.space, *command],
            cwd=self.folder,
            env=TRANSFER_SETTINGS | environment() | {"GLOO_SOCKET_IFNAME": "eth0"},
            stdin=subprocess.PIPE,
            stdout=self._files[-1],
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(text.encode())
        process.stdin.close()
        self.started.append(process)
        return process

    def train(self, *settings: str, torchrun: Sequence[str] = (), own_processes: bool = False) -> subprocess.Popen[bytes]:
        """A part of a run; trainers by torchrun, where its options are given.

        Args:
            own_processes: it sees no process of other hosts.
        """
        space = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc") if own_processes else ()
        launcher = ("-m", "torch.distributed.run", *torchrun) if torchrun else ()
        return self.start(*space, sys.executable, *launcher, TRAIN, *settings, f"store.hostname={self.address}")

    def cut(self) -> None:
        ip("link", "set", self.link, "down")

    def heal(self) -> None:
        ip("link", "set", self.link, "up")

    def shown(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')}" for path in self.folder.glob("*.txt"))

    def remove(self) -> None:
        remove_space(self.space)
        subprocess.run(["ip", "link", "delete", self.link], capture_output=True)
        for process in self.started:
            process.wait()
        for file in self._files:
            file.close()


@contextmanager
def hosts(folder: Path, names: Sequence[str]) -> Iterator[list[Host]]:
    """Hosts on a private network, removed at the end."""
    remove_leftovers()
    bridge = new_name()
    ip("link", "add", bridge, "type", "bridge")
    hosts: list[Host] = []
    try:
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            hosts.append(Host(bridge, number, folder / name))
        yield hosts
    finally:
        for host in hosts:
            host.remove()
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def start_services(host: Host) -> tuple[str, ...]:
    """A Mooncake and a Redis on `host`; returns the settings that point to them."""
    host.start(
        find_program("mooncake_master"), f"--rpc_address={host.address}", "--rpc_port=50051",
        f"--metrics_host={host.address}", "--metrics_port=9003", "--put_start_discard_timeout_sec=5",
        "--put_start_release_timeout_sec=15", output="master.txt",
    )  # fmt: skip
    host.start(
        find_program("mooncake_client"), f"--host={host.address}", "--port=50052", "--global_segment_size=64MB",
        f"--master_server_address={host.address}:50051", "--metadata_server=P2PHANDSHAKE", "--protocol=tcp", "--threads=2",
        output="client.txt",
    )  # fmt: skip
    settings = f"bind {host.address}\nport 6379\nrequirepass {SECRET}\nappendonly yes\ndir {host.folder}\n"
    host.start(str(shutil.which(PROGRAM)), "-", output="redis.txt", text=settings)
    return (
        f"store.address={host.address}:50051",
        f"store.metrics_address={host.address}:9003",
        "channel=redis",
        "control=redis",
        f"channel.address={host.address}:6379",
        "channel.secret_file=secret",
    )


def redis(services: Host, *command: str) -> str:
    """Redis's answer to `command`, asked on its own host, so that it works while the host is cut off."""
    client = ("ip", "netns", "exec", services.space, "redis-cli", "-h", services.address, "--no-auth-warning", "-a")
    return subprocess.run([*client, SECRET, *command], capture_output=True, text=True).stdout.strip()


def steps(services: Host, name: str) -> int:
    """Optimizer steps that the trainer of a run has acknowledged in the ledger."""
    return int(redis(services, "HGET", f"ldf:{{{name}}}:totals", "trained_step") or 0)


def stored(services: Host) -> list[str]:
    """Keys in the Mooncake store."""
    url = f"http://{services.address}:9003/get_all_keys"
    answer = ip("netns", "exec", services.space, sys.executable, "-c", READ.format(url=url))
    return answer.split()
