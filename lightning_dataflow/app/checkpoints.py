"""Finding and writing the checkpoints of a run."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dataflow.app.ranks import rank_from_environment
from lightning_dataflow.contracts import UserError

if TYPE_CHECKING:
    import lightning as L

_NAME = re.compile(r"step-(\d+)(-v\d+)?\.ckpt")


def resolve_checkpoint(ckpt_path: str | None, run_dir: Path) -> str | None:
    """The checkpoint to resume from. `last` is the complete one of the highest step in this run's folder.

    Raises UserError when there is none, or when a new run would mix its checkpoints with an earlier run's.
    """
    if ckpt_path is None:
        if rank_from_environment() == 0 and complete_checkpoints(run_dir):
            raise UserError(
                f"{run_dir} holds checkpoints of an earlier run: resume it with ckpt_path=last, or choose another run_name"
            )
        return None
    if ckpt_path == "last":
        found = complete_checkpoints(run_dir)
        if not found:
            raise UserError(
                f"no checkpoint in {run_dir}/checkpoints: with ckpt_path=last also name the run to resume, run_name=…"
            )
        return str(found[-1])
    if not Path(ckpt_path).exists():
        raise UserError(f"no checkpoint {ckpt_path}: give a file or folder, or `last` with run_name=…")
    return ckpt_path


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run in the order of their steps; a sharded one counts once its `meta.pt` is there."""
    found = []
    for path in (run_dir / "checkpoints").glob("step-*.ckpt"):
        match = _NAME.fullmatch(path.name)
        if match and (path.is_file() or (path / "meta.pt").is_file()):
            found.append((int(match[1]), path.stat().st_mtime, path))
    return [path for _, _, path in sorted(found)]


def save_final_checkpoint(trainer: "L.Trainer", run_dir: Path) -> None:
    """Save the last step, unless a callback did. Every rank calls it."""
    path = run_dir / "checkpoints" / f"step-{trainer.global_step:06d}.ckpt"
    if not trainer.strategy.broadcast(path.exists()):
        trainer.save_checkpoint(path)
