"""One owner for each folder that a command writes to."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.errors import BAD_SETTINGS
from lightning_dataflow.control.processes import pid_space
from lightning_dataflow.run.ranks import rank_from_environment

LOCK = "owner.lock"
PATIENCE_S = 0.5
"""A killed process keeps its locks until the kernel has finished removing it."""
POLL_S = 0.02
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_claims: dict[Path, int] = {}
"""Lock files, open until this process ends."""


def claim(folder: Path, remedy: str) -> None:
    """Own `folder` until this process ends. The owner, and processes that it starts, may claim it again.

    The lock is an flock: the kernel releases it however the process ends. It holds between processes of one machine, and
    between machines over NFS where the mount has locks. On a file system without locks a warning says so, and nothing is
    promised.

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
    deadline = time.monotonic() + PATIENCE_S
    while not _lock(file, folder):
        owner = _read_owner(file)
        if (owner.get("pids"), owner.get("pid")) == (pid_space(), os.getppid()):
            return os.close(file)
        if time.monotonic() > deadline:
            os.close(file)
            raise UserError(f"{folder} is in use by {_describe(owner)}: {remedy}")
        time.sleep(POLL_S)
    _write_owner(file)
    _claims[path] = file


def _lock(file: int, folder: Path) -> bool:
    """False while another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{folder} cannot be locked ({error.strerror}): do not start a second command that writes there", flush=True)
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
        return json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}


def _describe(owner: dict[str, Any]) -> str:
    return "process {pid} on {host} since {since}".format(**owner) if owner else "another process"


def _release_in_child() -> None:
    """A forked child that outlives its parent must not keep the parent's locks."""
    for file in _claims.values():
        os.close(file)
    _claims.clear()


os.register_at_fork(after_in_child=_release_in_child)


class ClaimRun(Callback):
    """Claims the run's folder before Hydra writes its settings there.

    Rank 0 claims for all ranks. Producers have folders of their own, and any number of them may join a run.

    Attributes:
        wanted: whether the command of this process owns the folder of its run.
    """

    wanted = False

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook. Exits with one line where another process owns the folder: Hydra drops exceptions of its hooks."""
        if not self.wanted or config.role == "producer":
            return
        if not _is_first_rank():
            with read_write(config.hydra):
                config.hydra.output_subdir = None  # else it would write the settings before rank 0 has the claim
            return
        with read_write(config.hydra):  # Hydra does the same later; `run_dir` refers to it
            config.hydra.runtime.output_dir = str(Path(config.hydra.run.dir).absolute())
        HydraConfig.instance().set_config(config)
        try:
            for folder in dict.fromkeys((config.hydra.run.dir, config.run_dir)):
                claim(
                    Path(folder),
                    "choose another run_name; or end that process, or wait for it, and resume with ckpt_path=last",
                )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(BAD_SETTINGS)


def _is_first_rank() -> bool:
    """Lightning's own launch on several nodes gives the first process of each node no rank."""
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return rank_from_environment() == 0 and node == "0"
