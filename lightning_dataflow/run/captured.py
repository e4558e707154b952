"""Captured features of a run: the folder that its settings name, and the capture into one."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from lightning_dataflow.config.files import read_secret
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.data.offline import is_captured
from lightning_dataflow.producers import capture_to_folder
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.run.claim import claim
from lightning_dataflow.run.ranks import rank_from_environment, wait_for_first_rank
from lightning_dataflow.targets import TargetEngine

log = logging.getLogger(__name__)

PROGRESS_S = 10.0


def named_folder(config: TrainConfig) -> str | None:
    """The folder of features that the settings name; None where they are captured into the run folder."""
    return config.topology.features if config.topology.is_disaggregated else config.store.root


def capture_once(config: TrainConfig, folder: Path, make_parts: Callable[[], tuple[PromptDataset, TargetEngine]]) -> None:
    """Capture into `folder`, unless that is done; every rank but the first waits for it.

    Args:
        make_parts: the prompts and the target, which are made only where the capture is.
    """
    if is_captured(folder):
        return
    if rank_from_environment() > 0:
        return wait_for_first_rank(lambda: is_captured(folder), f"features in {folder}")
    claim(folder, "wait for it, or choose another store.root")
    guarded = not config.topology.is_disaggregated  # otherwise the settings of the store are those of the shared one
    prompts, target = make_parts()
    capture_to_folder(
        prompts,
        target,
        folder,
        seed=config.seed,  # then groups are those that `online` captures
        capture_batch_size=config.target.capture_batch_size,
        capacity_bytes=config.store.capacity_bytes if guarded else None,
        secret=read_secret(config.store) if guarded else None,
        progress=_log_progress(),
    )


def _log_progress() -> Callable[[int, int], None]:
    """A callback for (done, total) that logs now and then, and at the end."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > PROGRESS_S:
            last = time.monotonic()
            log.info("captured %d/%d", done, total)

    return report
