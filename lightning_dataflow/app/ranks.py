"""Ranks before the process group exists, and at its end."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning_dataflow.contracts import UserError

TIMEOUT_S = 3600.0
POLL_S = 0.5


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
    abort either."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
