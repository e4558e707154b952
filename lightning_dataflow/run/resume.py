"""Finding and writing the checkpoints of a run."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dataflow.checkpoints.markers import abandon_later, has_marker, incomplete, latest_checkpoint
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.ranks import rank_from_environment

if TYPE_CHECKING:
    import lightning as L

log = logging.getLogger(__name__)


def resolve_checkpoint(ckpt_path: str | None, run_dir: Path, *, quiet: bool = False) -> str | None:
    """The checkpoint to resume from; None for a new run.

    Args:
        ckpt_path: `last` is the newest complete one in this run's folder, `auto` the same or None; or a path.
        quiet: do not log newer ones that are not complete. Of several ranks, only rank 0 does.

    Raises:
        UserError: there is none, or a new run would mix its checkpoints with an earlier run's.
    """
    if ckpt_path is None:
        if rank_from_environment() == 0 and _newest_silently(run_dir) is not None:
            raise UserError(
                f"{run_dir} holds checkpoints of an earlier run: resume it with ckpt_path=last, or choose another run_name"
            )
        return None
    if ckpt_path in ("last", "auto"):
        return _newest(run_dir, required=ckpt_path == "last", quiet=quiet or rank_from_environment() > 0)
    path = Path(ckpt_path)
    if not path.exists():
        raise UserError(f"no checkpoint {ckpt_path}: give a file or folder, or `last` with run_name=…")
    if has_marker(path) and (reason := incomplete(path)) is not None:
        raise UserError(f"{ckpt_path} is not a complete checkpoint: {reason}")
    return ckpt_path


def _newest(run_dir: Path, *, required: bool, quiet: bool) -> str | None:
    skipped: list[str] = []
    newest = latest_checkpoint(run_dir / "checkpoints", on_skip=skipped.append)
    if newest is None and required:
        raise UserError(
            "; ".join([f"no complete checkpoint in {run_dir}/checkpoints", *skipped])
            + ": name the run to resume by run_name=…, or start it without ckpt_path"
        )
    for line in [] if quiet else skipped:
        log.warning("%s; resuming from %s", line, newest.name if newest else "the start")
    return None if newest is None else str(newest)


def invalidate_later_checkpoints(checkpoint: Path, run_dir: Path) -> None:
    """Training resumes from `checkpoint`: those of later steps belong to a training that is given up, and no later resume
    may take one of them."""
    if checkpoint.resolve().parent == (run_dir / "checkpoints").resolve() and rank_from_environment() == 0:
        for later in abandon_later(checkpoint):
            log.warning("%s is of a later step than %s, so it no longer counts", later.name, checkpoint.name)


def resume_hint(step: int, run_dir: Path) -> str:
    """One line: how far the run got and how to resume it."""
    if (newest := _newest_silently(run_dir)) is None:
        return f"ended at step {step} without a checkpoint, so the same run_name can start anew"
    return f"ended at step {step}; resume from {newest.name} with ckpt_path=last run_name={run_dir.name}"


def save_final_checkpoint(trainer: "L.Trainer", run_dir: Path) -> None:
    """Save the last step, unless a callback did. Every rank calls it."""
    path = run_dir / "checkpoints" / f"step-{trainer.global_step:06d}.ckpt"
    if trainer.strategy.broadcast(incomplete(path) is not None):
        trainer.save_checkpoint(path)


def _newest_silently(run_dir: Path) -> Path | None:
    return latest_checkpoint(run_dir / "checkpoints", on_skip=lambda line: None)
