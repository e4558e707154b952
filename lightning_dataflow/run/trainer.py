"""The Lightning Trainer of a run: its arguments, loggers and callbacks."""

import signal
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any

import hydra
import lightning as L
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy

from lightning_dataflow.callbacks import AcceptanceEvaluation, RunMetrics, StreamCursor
from lightning_dataflow.callbacks.progress import PlainProgress
from lightning_dataflow.checkpoints.trainer import DataFlowTrainer
from lightning_dataflow.cli.hydra_command import terminate
from lightning_dataflow.config.schema import DataConfig, TrainConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.data import RefSource
from lightning_dataflow.run.ranks import num_processes
from lightning_dataflow.targets.hardware import multiplies_bfloat16

if TYPE_CHECKING:
    from lightning_dataflow.run.builder import Builder

DERIVED_ARGUMENTS = {
    "max_epochs": "trainer.max_steps, or trainer.max_steps=null data.num_passes=…",
    "limit_train_batches": "trainer.max_steps",
    "accumulate_grad_batches": "data.global_batch_size and data.micro_batch_size",
    "num_sanity_val_steps": "evaluate.every_n_steps",
    "default_root_dir": "run_name",
}


class _EndsAtSigterm(L.Callback):
    """SIGTERM ends training as Ctrl-C does, at once.

    Lightning's own handler lets the batch end first, however long it waits for its samples, exits with status 0, and
    broadcasts among ranks of which each may be anywhere.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook, the first after it has set its handler; that is gone again at the end."""
        signal.signal(signal.SIGTERM, terminate)


def make_trainer(parts: "Builder") -> L.Trainer:
    """The Trainer, with the arguments that follow from others filled in. Raises UserError for what does not fit."""
    config = parts.config
    arguments = {key: value for key, value in config.trainer.items() if key != "_target_"}
    for name, instead in DERIVED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise UserError(f"trainer.{name}={arguments[name]}: this follows from other settings, use {instead}")
    world_size = num_processes(arguments)
    if isinstance(strategy := arguments.get("strategy"), dict):
        arguments["strategy"] = _strategy(parts, dict(strategy), world_size)
    if arguments.get("precision") == "auto":
        arguments["precision"] = _auto_precision(arguments)
    accumulation = parts.data.accumulate_grad_batches(world_size)
    max_steps = count_steps(config.data, parts.source, arguments.pop("max_steps", None))
    if not arguments.get("fast_dev_run"):
        arguments |= {"accumulate_grad_batches": accumulation, "limit_train_batches": max_steps * accumulation}
    logger, callbacks = _loggers(config.logger or {}) or False, _callbacks(parts)
    try:
        return DataFlowTrainer(
            max_steps=max_steps,
            max_epochs=1,
            num_sanity_val_steps=0,
            default_root_dir=config.run_dir,
            logger=logger,
            callbacks=callbacks,
            **arguments,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer: {error}") from error


def count_steps(data: DataConfig, source: RefSource, max_steps: int | None) -> int:
    """Optimizer steps of the run, from `max_steps` or from passes over the data. Raises UserError unless one is given."""
    if max_steps is not None and data.num_passes is not None:
        raise UserError(
            f"trainer.max_steps={max_steps} and data.num_passes={data.num_passes} both say when training ends: set one "
            "of them to null"
        )
    if max_steps is not None:
        if max_steps < 1:
            raise UserError(f"trainer.max_steps={max_steps}: a stream has no end of its own, give at least 1 step")
        return max_steps
    if data.num_passes is None:
        raise UserError("neither trainer.max_steps nor data.num_passes says when training ends: set one of them")
    if data.row_tokens is not None:
        raise UserError(
            f"data.num_passes={data.num_passes} with data.row_tokens={data.row_tokens}: how many samples fill a step of "
            "packed rows shows while training only, so set trainer.max_steps instead"
        )
    steps, left_over = divmod(data.num_passes * len(source), data.global_batch_size)
    if left_over:
        print(
            f"{left_over} samples at the end of {data.num_passes} passes over {len(source)} fill no step of "
            f"global_batch_size={data.global_batch_size} and are not trained on",
            flush=True,
        )
    if steps < 1:
        raise UserError(
            f"{data.num_passes} passes over {len(source)} samples fill no step of global_batch_size="
            f"{data.global_batch_size}: add samples or passes, or lower data.global_batch_size"
        )
    return steps


def check_parts(config: TrainConfig) -> None:
    """Raise UserError for settings of the Trainer, its loggers and callbacks that nothing would read, before anything is
    captured or started."""
    if unknown := sorted(config.trainer.keys() - signature(L.Trainer).parameters.keys() - {"_target_"}):
        near = get_close_matches(unknown[0], signature(L.Trainer).parameters)
        hint = f"did you mean trainer.{near[0]}" if near else "see Lightning's documentation of Trainer"
        raise UserError(f"trainer.{unknown[0]}: Lightning's Trainer has no such argument, {hint}")
    entries = {f"callbacks.{name}": entry for name, entry in (config.callbacks or {}).items()}
    entries |= _logger_entries(config.logger or {})
    if isinstance(strategy := config.trainer.get("strategy"), dict):
        entries["trainer.strategy"] = strategy
    for setting, entry in entries.items():
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise UserError(f"{setting} names no class, so nothing reads it: set {setting}._target_=…, or ~{setting}")


def _strategy(parts: "Builder", arguments: dict[str, Any], world_size: int) -> Any:
    if arguments.get("data_parallel_size") == "auto":
        arguments["data_parallel_size"] = world_size
    if arguments["_target_"].endswith(".FSDPStrategy"):
        if not torch.cuda.is_available():
            raise UserError("trainer=fsdp needs a GPU, this machine has none: use trainer=fsdp2 or trainer=ddp")
        options = {key: value for key, value in arguments.items() if key != "_target_"}
        return FSDPStrategy(auto_wrap_policy={type(parts.module.draft)}, **options)
    return _make("trainer.strategy", arguments)


def _loggers(config: Mapping[str, Any]) -> list[Any]:
    return [_make(setting, entry) for setting, entry in _logger_entries(config).items()]


def _logger_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Loggers by the setting that names each; the group holds one, or several by name."""
    return {"logger": config} if "_target_" in config else {f"logger.{name}": entry for name, entry in config.items()}


def _make(setting: str, entry: Mapping[str, Any], *arguments: Any) -> Any:
    """Instantiate the class that `entry` names by `_target_`, with `arguments` and the entry's other keys. Raises UserError
    if there is no such class or it does not take these arguments; other errors pass through."""
    name = entry["_target_"].rsplit(".", 1)[-1]
    try:
        return hydra.utils.instantiate(entry, *arguments, _convert_="all")
    except InstantiationException as error:
        if str(error).startswith("Error locating target"):
            raise UserError(f"{setting}._target_={entry['_target_']} cannot be imported: correct its name") from error
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        cause = str(error.__cause__)
        if not (cause.startswith(f"{name}.__init__()") and "argument" in cause):
            raise
        raise UserError(f"{setting}: {cause}; correct the keys of {setting}") from error


def _callbacks(parts: "Builder") -> list[L.Callback]:
    callbacks: list[L.Callback] = [
        _EndsAtSigterm(),
        RunMetrics(),  # before the others, so that it does not time them
        StreamCursor(),
        parts.result_writer,
        PlainProgress(),
    ]
    _check_monitors(parts)
    configured: list[L.Callback] = []
    for name, entry in (parts.config.callbacks or {}).items():
        if entry["_target_"].rsplit(".", 1)[-1] == AcceptanceEvaluation.__name__:
            prompts = [prompt.question for prompt in parts.prompts[1]]
            configured.append(_make(f"callbacks.{name}", entry, parts.evaluation_target, prompts))
        else:
            configured.append(_make(f"callbacks.{name}", entry))
    configured.sort(key=lambda callback: not isinstance(callback, WeightAveraging))  # updates come before measurements
    return [*callbacks, *configured]


def _check_monitors(parts: "Builder") -> None:
    """What follows a measurement needs measurements."""
    entries = parts.config.callbacks or {}
    measured = "acceptance" in entries and parts.config.evaluate.every_n_steps > 0
    for name, entry in entries.items():
        if str(entry.get("monitor", "")).startswith("val/") and not measured:
            raise UserError(
                f"callbacks.{name} follows {entry['monitor']}, which is measured before and after training only: set "
                "evaluate.every_n_steps"
            )


def _auto_precision(trainer: Mapping[str, Any]) -> str:
    on_gpu = trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"
