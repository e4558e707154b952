"""Ranks before the process group exists, and at its end."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.waiting import wait_until

log = logging.getLogger(__name__)

TIMEOUT_S = 3600.0
POLL_S = 0.5
GLOO_TIMEOUT_S = 5.0


def rank_from_environment(num_devices: int = 1) -> int:
    """This process's rank as torchrun, SLURM or Lightning's launcher set it; 0 in a process of its own.

    Lightning's launcher sets LOCAL_RANK, but not for the first process of a node; the user sets NODE_RANK. Within SLURM
    its LOCAL_RANK counts: SLURM_PROCID is the same for all that it starts.

    Args:
        num_devices: processes of a node, which only Lightning's ranks depend on. Rank 0 is rank 0 without it.
    """
    if (rank := _number("RANK")) is not None:
        return rank
    local_rank, slurm_rank = _number("LOCAL_RANK"), _number("SLURM_PROCID")
    if local_rank is None and slurm_rank is not None:
        return slurm_rank
    node_rank = _number("NODE_RANK") or _number("GROUP_RANK") or 0
    return node_rank * num_devices + (local_rank or 0)


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else None


def num_devices(trainer: Mapping[str, Any]) -> int:
    """Processes of a node that these Trainer arguments lead to."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    if trainer.get("accelerator", "auto") == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def num_processes(trainer: Mapping[str, Any]) -> int:
    """World size that these Trainer arguments lead to."""
    return num_devices(trainer) * (trainer.get("num_nodes") or 1)


def wait_for_first_rank(is_done: Callable[[], bool], what: str) -> None:
    """Wait until rank 0 has finished `what`. Raises UserError after TIMEOUT_S."""
    log.info("waiting for rank 0 to finish %s, at most %.0f s", what, TIMEOUT_S)
    if not wait_until(is_done, TIMEOUT_S, POLL_S, f"rank 0 to finish {what}"):
        raise UserError(f"waited {TIMEOUT_S:.0f} s for rank 0 to finish {what}: see rank 0's messages")


def leave_process_group() -> None:
    """Wait for all ranks, then close this rank's connections: a rank that exits while another still uses them can abort
    either.

    Gloo's threads may hold the last tensors a little longer, and live on where something else still refers to their group
    (a DeviceMesh in DTensor's caches). A thread that frees a tensor of Python's while the interpreter exits aborts the
    process, so this waits until they sleep.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
        _wait_for_gloo_to_sleep()


def _wait_for_gloo_to_sleep() -> None:
    """Until every gloo thread was asleep ten times in a row, or 5 s have passed. Elsewhere than on Linux: not at all."""
    deadline, asleep = time.monotonic() + GLOO_TIMEOUT_S, 0
    while asleep < 10 and time.monotonic() < deadline:
        asleep = asleep + 1 if set(_gloo_thread_states()) <= {"S"} else 0
        time.sleep(0.005)


def _gloo_thread_states() -> Iterator[str]:
    """State letters, as in `man proc_pid_stat`, of this process's gloo threads."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if name.startswith("pt_gloo"):
                yield rest.split()[0]
