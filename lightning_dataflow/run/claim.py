"""One owner for each folder that a command writes to."""

import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.errors import NO_LOCKS
from lightning_dataflow.contracts.foreign import one_line, parse_json
from lightning_dataflow.contracts.waiting import try_lock, wait_until
from lightning_dataflow.control.processes import pid_space

log = logging.getLogger(__name__)

LOCK = "owner.lock"
PATIENCE_S = 0.5
"""A killed process keeps its locks until the kernel has finished removing it."""
POLL_S = 0.02

_claims: dict[Path, int] = {}
"""Lock files, open until this process ends."""


def claim(folder: Path, remedy: str) -> None:
    """Own `folder` until this process ends. The owner, and processes that it starts, may claim it again.

    The kernel releases the lock, an flock, however the process ends. It holds between the processes of one machine, and
    between machines over NFS if the mount supports locks. A file system without locks is only warned of.

    Args:
        remedy: ends the message of the error.

    Raises:
        UserError: another process owns the folder, or it cannot be written.
    """
    if (path := folder.resolve()) in _claims:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # closed by exec: no daemon keeps the lock
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    if not _lock(file, folder):
        owner = _read_owner(file)
        if (owner.get("pids"), owner.get("pid")) == (pid_space(), os.getppid()):
            return os.close(file)
        if not wait_until(lambda: _lock(file, folder), PATIENCE_S, POLL_S, f"the owner of {folder}"):
            owner = _read_owner(file)
            os.close(file)
            known = owner.keys() >= {"pid", "host", "since"}
            whose = one_line("process {pid} on {host} since {since}".format(**owner)) if known else "another process"
            raise UserError(f"{folder} is in use by {whose}: {remedy}")
    _write_owner(file)
    _claims[path] = file


def _lock(file: int, folder: Path) -> bool:
    """False while another process has the lock."""
    try:
        return try_lock(file)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s cannot be locked (%s): do not start a second command that writes there", folder, error.strerror)
        return True


def _write_owner(file: int) -> None:
    owner = {
        "pid": os.getpid(),
        "pids": pid_space(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(owner).encode(), 0)
    os.fsync(file)  # another machine may read it


def _read_owner(file: int) -> dict[str, Any]:
    """Empty until the owner has written it."""
    try:
        owner = parse_json(os.pread(file, 4096, 0), LOCK)
    except UserError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _release_in_child() -> None:
    """A forked child that outlives its parent must not keep the parent's locks."""
    for file in _claims.values():
        os.close(file)
    _claims.clear()


os.register_at_fork(after_in_child=_release_in_child)
