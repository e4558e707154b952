"""What a process of the run says of itself, and whether it still runs, as far as this machine can tell."""

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ALIVE, FAILED, FATAL = 0, 1, 2
"""What a process reports: FATAL is an error that every process of its kind would meet."""


@cache
def pid_space() -> str:
    """Names whose process ids these are: two processes with the same can look for each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_running(pid: int) -> bool:
    """Whether this machine, or this container, has such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def this_process(state: str, condition: int) -> dict[str, Any]:
    """What this process reports of itself; the ledger adds `seen`, when it did."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "pids": pid_space(), "state": state, "failed": condition}


def part_status(name: str, part: Mapping[str, Any], now: float) -> dict[str, Any]:
    """A report as `MetadataStore.parts` gives it."""
    fields = {key: part[key] for key in ("host", "pid", "pids", "state")}
    condition = {"failed": part["failed"] != ALIVE, "fatal": part["failed"] == FATAL}
    return {"name": name, **fields, "seen_s_ago": now - part["seen"], **condition}
