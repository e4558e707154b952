"""The `train` command."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dataflow.checkpoints.markers import latest_checkpoint
from lightning_dataflow.cli.hydra_command import command, is_multirun, job_arguments
from lightning_dataflow.cli.sweep import run_job
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.run.ranks import leave_process_group
from lightning_dataflow.run.resume import go_on_from, resolve_checkpoint, save_final_checkpoint

if TYPE_CHECKING:
    import lightning as L

    from lightning_dataflow.run.builder import Builder


def run(config: TrainConfig, settings: dict[str, Any]) -> float | None:
    """The part of a run that this process is: all of it, a supervisor, a producer, or a trainer.

    In a multirun, a job of its own; returns what a sweeper optimises.
    """
    from lightning_dataflow.run.streams import check_topology, is_disaggregated
    from lightning_dataflow.run.trainer import check_parts

    check_topology(config)
    if is_multirun():
        return run_job(job_arguments(), Path(config.run_dir), config.sweep_metric)
    if config.role == "producer":
        from lightning_dataflow.run.producer import produce

        produce(config, settings)
        return None
    check_parts(config)
    if config.role == "auto" and is_disaggregated(config):
        from lightning_dataflow.supervise.supervisor import supervise

        resolve_checkpoint(config.ckpt_path, Path(config.run_dir), on_skip=lambda line: None)  # the trainer says it
        supervise(config, job_arguments())
    else:
        train(config, settings)
    return None


def train(config: TrainConfig, settings: dict[str, Any]) -> None:
    """Train a draft, write `result.json`, a figure and a last checkpoint to the run folder."""
    import torch
    from lightning import seed_everything

    from lightning_dataflow.cli.figure import draw_result
    from lightning_dataflow.run.builder import Builder

    seed_everything(config.seed, verbose=False)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    run_dir = Path(config.run_dir)
    checkpoint = resolve_checkpoint(config.ckpt_path, run_dir)
    if checkpoint is not None:
        go_on_from(Path(checkpoint), run_dir)
    parts = Builder(config, settings)
    trainer = parts.trainer
    try:
        trainer.fit(parts.module, parts.data, ckpt_path=checkpoint, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        if trainer.is_global_zero:
            print(_how_far(trainer.global_step, run_dir), flush=True)
        raise
    except NotFiniteError as error:
        if error is not parts.module.failure:  # the fit had not begun
            raise
        raise NotFiniteError(f"{error}; {_how_far(trainer.global_step, run_dir)}") from error
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if parts.result_writer.path is None:
        if config.ckpt_path != "auto":
            raise UserError(
                f"{checkpoint} is at step {trainer.global_step} already, trainer.max_steps={trainer.max_steps} leaves "
                "nothing to train: raise it"
            )
        _conclude(parts, trainer)
    save_final_checkpoint(trainer, run_dir)
    if skipped := parts.data.skipped():
        first = ", ".join(f"{seq} ({reason})" for seq, reason in sorted(skipped.items())[:3])
        print(f"{len(skipped)} samples were not trained: seq {first}", flush=True)
    if trainer.is_global_zero:
        figure = "figure.png, " if draw_result(run_dir / "result.json", run_dir / "figure.png") else ""
        history = json.loads((run_dir / "result.json").read_text()).get("acceptance", [])
        if len(history) > 1:
            first, last = history[0], history[-1]
            print(f"acceptance length {first['acceptance_length']:.3f} → {last['acceptance_length']:.3f}", flush=True)
        print(f"results in {run_dir}: result.json, {figure}checkpoints/", flush=True)
    leave_process_group()


def _how_far(step: int, run_dir: Path) -> str:
    """One line: how far the run got, and how to resume it."""
    newest = latest_checkpoint(run_dir / "checkpoints", on_skip=lambda line: None)
    if newest is None:
        return f"ended at step {step}, without a checkpoint, so the same run_name can start anew"
    return f"ended at step {step}; resume from {newest.name} with ckpt_path=last run_name={run_dir.name}"


def _conclude(parts: "Builder", trainer: "L.Trainer") -> None:
    """End a run that was killed between its last checkpoint and its end: with nothing to train, Lightning calls no hook."""
    parts.data.start(resumed=True)
    parts.data.close("completed")
    if not _is_complete(Path(parts.config.run_dir) / "result.json", trainer.global_step):
        parts.result_writer.on_train_start(trainer, parts.module)
        parts.result_writer.on_fit_end(trainer, parts.module)


def _is_complete(path: Path, num_steps: int) -> bool:
    """Whether `path` is the result of a run that came to its end at this step."""
    if not path.is_file():
        return False
    result = json.loads(path.read_text())
    return (result["status"], result["optimizer_steps"]) == ("completed", num_steps)


main = command(run, owns_folder=True)
