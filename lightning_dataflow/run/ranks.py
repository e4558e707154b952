"""Ranks before the process group exists, and at its end."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError

TIMEOUT_S = 3600.0
POLL_S = 0.5
GLOO_TIMEOUT_S = 5.0


def rank_from_environment() -> int:
    """This process's rank as torchrun, SLURM or Lightning's launcher tell it; 0 in a process of its own."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def num_processes(trainer: Mapping[str, Any]) -> int:
    """World size that these Trainer arguments lead to."""
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes") or 1
    if isinstance(devices, list):
        return len(devices) * nodes
    if isinstance(devices, int) and devices > 0:
        return devices * nodes
    if trainer.get("accelerator", "auto") == "cpu":
        return nodes
    import torch

    return max(1, torch.cuda.device_count()) * nodes


def first_rank_does(
    work: Callable[[], None], is_done: Callable[[], bool], what: str, *, timeout_s: float = TIMEOUT_S
) -> None:
    """Run `work` on rank 0 unless `is_done`; other ranks wait until it is, or raise UserError after `timeout_s`."""
    if is_done():
        return
    if rank_from_environment() == 0:
        work()
        return
    print(f"waiting for rank 0 to finish {what}, at most {timeout_s:.0f} s", flush=True)
    deadline = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline:
            raise UserError(f"waited {timeout_s:.0f} s for rank 0 to finish {what}: see rank 0's messages")
        time.sleep(POLL_S)


def leave_process_group() -> None:
    """Every rank waits for the others, then closes its connections: a rank that exits while another still uses them can
    abort either.

    Gloo's threads may hold the last tensors a little longer, and live on where something else still refers to their group
    (a DeviceMesh in DTensor's caches). A thread that frees a tensor of Python's while the interpreter ends aborts the
    process: wait until they sleep.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
        _wait_for_gloo_to_sleep()


def _wait_for_gloo_to_sleep() -> None:
    """Until every thread of gloo's was asleep ten times in a row, or 5 s have passed. Elsewhere than on Linux: at once."""
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
