"""The `train` command."""

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dataflow.cli.hydra_command import command, is_multirun, job_arguments
from lightning_dataflow.cli.sweep import run_job
from lightning_dataflow.config.files import write_date
from lightning_dataflow.config.rules import check_topology, check_training
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.contracts.foreign import printable
from lightning_dataflow.run.ranks import leave_process_group
from lightning_dataflow.run.resume import (
    invalidate_later_checkpoints,
    resolve_checkpoint,
    resume_hint,
    save_final_checkpoint,
)

if TYPE_CHECKING:
    import lightning as L

    from lightning_dataflow.run.builder import Builder


def run(config: TrainConfig) -> float | None:
    """The part of a run that this process is: all of it, a supervisor, a producer, or a trainer.

    In a multirun, a job of its own; returns what a sweeper optimises.
    """
    check_topology(config)
    if is_multirun():
        return run_job(job_arguments(), Path(config.run_dir), config.sweep_metric)
    if config.role == "producer":
        produce(config)
        return None
    from lightning_dataflow.run.trainer import check_arguments

    check_training(config)
    check_arguments(config.trainer)
    write_date(Path(config.run_dir))
    if config.role == "auto" and config.topology.is_disaggregated:
        from lightning_dataflow.supervise.supervisor import supervise

        resolve_checkpoint(config.ckpt_path, Path(config.run_dir), quiet=True)  # the trainer logs what it skips
        supervise(config, job_arguments())
    else:
        train(config)
    return None


def produce(config: TrainConfig) -> None:
    """Capture for a trainer elsewhere."""
    from lightning_dataflow.run import producer
    from lightning_dataflow.run.builder import Builder

    builder = Builder(config)
    with builder.resources:
        producer.produce(builder.workers(f"producer-{socket.gethostname()}-{os.getpid()}"))


def train(config: TrainConfig) -> None:
    """Train a draft, write `result.json`, a figure and a last checkpoint to the run folder."""
    from lightning import seed_everything

    from lightning_dataflow.run.builder import Builder

    seed_everything(config.seed, verbose=False)
    run_dir = Path(config.run_dir)
    checkpoint = resolve_checkpoint(config.ckpt_path, run_dir)
    if checkpoint is not None:
        invalidate_later_checkpoints(Path(checkpoint), run_dir)
    builder = Builder(config)
    with builder.resources:
        _train(builder, checkpoint, run_dir)


def _train(builder: "Builder", checkpoint: str | None, run_dir: Path) -> None:
    config, trainer = builder.config, builder.trainer
    _fit(builder, trainer, checkpoint, run_dir)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if builder.result_writer.path is None:
        if config.ckpt_path != "auto":
            raise UserError(
                f"{checkpoint} is at step {trainer.global_step} already, trainer.max_steps={trainer.max_steps} leaves "
                "nothing to train: raise it"
            )
        _conclude(builder, trainer, run_dir)
    save_final_checkpoint(trainer, run_dir)
    if skipped := builder.data.skipped():
        first = ", ".join(f"{seq} ({reason})" for seq, reason in sorted(skipped.items())[:3])
        print(printable(f"{len(skipped)} samples were not trained: seq {first}"), flush=True)
    if trainer.is_global_zero:
        _show_result(run_dir)
    leave_process_group()


def _fit(builder: "Builder", trainer: "L.Trainer", checkpoint: str | None, run_dir: Path) -> None:
    """Train. Where that is interrupted or fails, say how to resume it."""
    module = builder.module
    try:
        trainer.fit(module, builder.data, ckpt_path=checkpoint, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        if trainer.is_global_zero:
            print(resume_hint(trainer.global_step, run_dir), flush=True)
        raise
    except NotFiniteError as error:
        if error is not module.failure:  # the fit had not begun
            raise
        raise NotFiniteError(f"{error}; {resume_hint(trainer.global_step, run_dir)}") from error


def _conclude(builder: "Builder", trainer: "L.Trainer", run_dir: Path) -> None:
    """End a run that was killed between its last checkpoint and its end: with nothing to train, Lightning calls no hook."""
    builder.data.start(resumed=True)
    builder.data.close("completed")
    path = run_dir / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {"status": None}
    if result["status"] != "completed" or result["optimizer_steps"] != trainer.global_step:
        builder.result_writer.on_train_start(trainer, builder.module)
        builder.result_writer.on_fit_end(trainer, builder.module)


def _show_result(run_dir: Path) -> None:
    from lightning_dataflow.cli.figure import draw_result

    result = json.loads((run_dir / "result.json").read_text())
    figure = "figure.png, " if draw_result(result, run_dir / "figure.png") else ""
    history = result.get("acceptance", [])
    if len(history) > 1:
        first, last = (measurement["acceptance_length"] for measurement in (history[0], history[-1]))
        print(f"acceptance length {first:.3f} → {last:.3f}", flush=True)
    print(f"results in {run_dir}: result.json, {figure}checkpoints/", flush=True)


main = command(run, owns_folder=True)
