"""What a process of the run says of itself, and whether it still runs, as far as this machine can tell."""

import os
import socket
from functools import cache
from pathlib import Path
from typing import Any


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


def this_process(state: str, *, failed: bool = False, fatal: bool = False) -> dict[str, Any]:
    """What this process reports of itself; the ledger adds `seen`, when it did."""
    origin = {"host": socket.gethostname(), "pid": os.getpid(), "pids": pid_space()}
    return {**origin, "state": state, "failed": failed, "fatal": fatal}
