"""Finding and writing the checkpoints of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dataflow.checkpoints.markers import abandon_later, has_marker, incomplete, latest_checkpoint
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.ranks import rank_from_environment

if TYPE_CHECKING:
    import lightning as L


def resolve_checkpoint(ckpt_path: str | None, run_dir: Path, *, on_skip: Callable[[str], None] | None = None) -> str | None:
    """The checkpoint to resume from; None for a new run.

    Args:
        ckpt_path: `last` is the newest complete one in this run's folder, `auto` the same or None; or a path.
        on_skip: told of newer ones that are not complete; rank 0 prints that by default.

    Raises:
        UserError: there is none, or a new run would mix its checkpoints with an earlier run's.
    """
    skipped: list[str] = []
    found = latest_checkpoint(run_dir / "checkpoints", on_skip=skipped.append)
    if ckpt_path is None:
        if rank_from_environment() == 0 and found is not None:
            raise UserError(
                f"{run_dir} holds checkpoints of an earlier run: resume it with ckpt_path=last, or choose another run_name"
            )
        return None
    if ckpt_path in ("last", "auto"):
        if found is None and ckpt_path == "last":
            raise UserError(
                "; ".join([f"no complete checkpoint in {run_dir}/checkpoints", *skipped])
                + ": name the run to resume by run_name=…, or start it without ckpt_path"
            )
        if rank_from_environment() == 0:
            for line in skipped:
                (on_skip or _print)(f"{line}; going on from {found.name if found else 'the start'}")
        return None if found is None else str(found)
    if not Path(ckpt_path).exists():
        raise UserError(f"no checkpoint {ckpt_path}: give a file or folder, or `last` with run_name=…")
    if has_marker(Path(ckpt_path)) and (reason := incomplete(Path(ckpt_path))) is not None:
        raise UserError(f"{ckpt_path} is not a complete checkpoint: {reason}")
    return ckpt_path


def go_on_from(checkpoint: Path, run_dir: Path) -> None:
    """Later checkpoints of this run are of a training that is given up: no later resume may take one of them."""
    if checkpoint.resolve().parent == (run_dir / "checkpoints").resolve() and rank_from_environment() == 0:
        for later in abandon_later(checkpoint):
            _print(
                f"{later.name} is of a later step than {checkpoint.name}, which training goes on from: it no longer counts"
            )


def save_final_checkpoint(trainer: "L.Trainer", run_dir: Path) -> None:
    """Save the last step, unless a callback did. Every rank calls it."""
    path = run_dir / "checkpoints" / f"step-{trainer.global_step:06d}.ckpt"
    if trainer.strategy.broadcast(incomplete(path) is not None):
        trainer.save_checkpoint(path)


def _print(line: str) -> None:
    print(line, flush=True)
