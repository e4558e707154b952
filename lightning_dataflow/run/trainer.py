"""The Lightning Trainer of a run: its arguments, loggers and callbacks."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy

from lightning_dataflow.callbacks import AcceptanceEvaluation
from lightning_dataflow.checkpoints.trainer import DataFlowTrainer
from lightning_dataflow.config.instantiate import instantiate
from lightning_dataflow.config.rules import logger_entries
from lightning_dataflow.config.schema import DataConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.ranks import num_processes
from lightning_dataflow.run.signals import on_sigterm
from lightning_dataflow.targets.hardware import multiplies_bfloat16

log = logging.getLogger(__name__)


class EndAtSigterm(L.Callback):
    """SIGTERM ends training as Ctrl-C does, at once.

    Lightning's own handler lets the batch end first, however long it waits for its samples, exits with status 0, and
    broadcasts among ranks of which each may be anywhere. Lightning sets it before `on_train_start`, and removes it itself.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, on_sigterm)


def check_arguments(trainer: Mapping[str, Any]) -> None:
    """Raise UserError for an argument that neither Lightning's Trainer nor ours has."""
    known = signature(L.Trainer).parameters.keys() | {"max_bad_steps"}
    if unknown := sorted(trainer.keys() - known - {"_target_"}):
        near = get_close_matches(unknown[0], known)
        hint = f"did you mean trainer.{near[0]}" if near else "see Lightning's documentation of Trainer"
        raise UserError(f"trainer.{unknown[0]}: Lightning's Trainer has no such argument, {hint}")


def make_trainer(
    settings: Mapping[str, Any], *, draft: torch.nn.Module, max_steps: int, accumulation: int, **arguments: Any
) -> L.Trainer:
    """A Trainer with `settings`, `arguments`, and what follows from the settings of data. Raises UserError for what does
    not fit together.

    Args:
        draft: an fsdp strategy wraps it as one unit.
    """
    arguments |= {key: value for key, value in settings.items() if key not in ("_target_", "max_steps")}
    if isinstance(strategy := arguments.get("strategy"), Mapping):
        arguments["strategy"] = _make_strategy(strategy, num_processes(settings), type(draft))
    if arguments.get("precision") == "auto":
        arguments["precision"] = _auto_precision(settings)
    if not arguments.get("fast_dev_run"):
        arguments |= {"accumulate_grad_batches": accumulation, "limit_train_batches": max_steps * accumulation}
    try:
        return DataFlowTrainer(max_steps=max_steps, max_epochs=1, num_sanity_val_steps=0, **arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer: {error}") from error


def count_steps(data: DataConfig, num_samples: int, max_steps: int | None) -> int:
    """Optimizer steps of the run, from `max_steps` or from passes over the samples. Raises UserError if they fill none."""
    if max_steps is not None:
        return max_steps
    assert data.num_passes is not None, "one of them is set"
    steps, left_over = divmod(data.num_passes * num_samples, data.global_batch_size)
    if left_over:
        log.warning(
            "%d samples at the end of %d passes over %d fill no step of global_batch_size=%d and are not trained on",
            *(left_over, data.num_passes, num_samples, data.global_batch_size),
        )
    if steps < 1:
        raise UserError(
            f"{data.num_passes} passes over {num_samples} samples fill no step of global_batch_size="
            f"{data.global_batch_size}: add samples or passes, or lower data.global_batch_size"
        )
    return steps


def make_loggers(config: Mapping[str, Any] | None) -> list[Any] | bool:
    """Loggers of the group `logger`; False for none, where Lightning would add its own."""
    return [instantiate(setting, entry) for setting, entry in logger_entries(config or {}).items()] or False


def make_callbacks(
    entries: Mapping[str, Mapping[str, Any]] | None, acceptance_arguments: Callable[[], Sequence[Any]]
) -> list[L.Callback]:
    """Callbacks of the group `callbacks`; AcceptanceEvaluation gets further arguments. WeightAveraging comes first, since
    measurements read its weights."""
    callbacks: list[L.Callback] = []
    for name, entry in (entries or {}).items():
        measures = entry["_target_"].rsplit(".", 1)[-1] == AcceptanceEvaluation.__name__
        callbacks.append(instantiate(f"callbacks.{name}", entry, *(acceptance_arguments() if measures else ())))
    return sorted(callbacks, key=lambda callback: not isinstance(callback, WeightAveraging))


def _make_strategy(settings: Mapping[str, Any], world_size: int, draft: type[torch.nn.Module]) -> Any:
    options = dict(settings)
    if options.get("data_parallel_size") == "auto":
        options["data_parallel_size"] = world_size
    if not options["_target_"].endswith(".FSDPStrategy"):
        return instantiate("trainer.strategy", options)
    if not torch.cuda.is_available():
        raise UserError("trainer=fsdp needs a GPU, this machine has none: use trainer=fsdp2 or trainer=ddp")
    del options["_target_"]
    return FSDPStrategy(auto_wrap_policy={draft}, **options)


def _auto_precision(trainer: Mapping[str, Any]) -> str:
    on_gpu = trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"
