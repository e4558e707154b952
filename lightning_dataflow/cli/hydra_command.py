"""What all commands share: configuration, logging, and one-line errors."""

import _thread
import dataclasses
import difflib
import errno
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_dataflow.config.conditions import drop_conditions, register_conditions
from lightning_dataflow.config.schema import TrainConfig, register_schemas
from lightning_dataflow.contracts import CapacityError, NotFiniteError, PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.contracts.errors import BAD_SETTINGS, INTERRUPTED, RETRYABLE, TERMINATED
from lightning_dataflow.run.claim import ClaimRun
from lightning_dataflow.run.ranks import rank_from_environment

CONFIG_DIR_FLAGS = ("-cd", "--config-dir")
TRAINERS = (
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.Trainer",
    "lightning.pytorch.trainer.trainer.Trainer",
    "lightning_dataflow.DataFlowTrainer",
)
"""What `trainer._target_` may say; a DataFlowTrainer is built for each."""
AGAIN_S = 0.01

Command = Callable[[TrainConfig, dict[str, Any]], Any]


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler, or whoever stops a container, ends this process. What answers Ctrl-C answers this too."""


def terminate(number: int, frame: object) -> NoReturn:
    """The handler of SIGTERM. Heeds it once: a scheduler may tell all parts, and their supervisor then tells them again."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, _heed_no_more)
    raise Terminated


def _heed_no_more(number: int, frame: object) -> None:
    """Not SIG_IGN: of a signal that is on its way Python would print that it is ignored."""


def break_off(number: int, frame: object) -> NoReturn:
    """The handler of SIGINT. A SIGTERM after it asks for the same, and must not disturb the answer; a second Ctrl-C may."""
    signal.signal(signal.SIGTERM, _heed_no_more)
    raise KeyboardInterrupt


def command(function: Command, *, keeps_folder: bool = True, owns_folder: bool = False) -> Callable[[], None]:
    """Make a Hydra command of `function(config, settings)`: typed configuration, and the same as plain containers.

    Args:
        keeps_folder: whether the folder that Hydra makes for each call stays where nothing was written into it.
        owns_folder: whether no other such command may write to that folder meanwhile; see ClaimRun.
    """

    @hydra.main(version_base="1.3", config_path="pkg://lightning_dataflow.conf", config_name="train")
    @wraps(function)
    def run(config: DictConfig) -> Any:
        try:
            _check_run_name()
            drop_conditions(config)
            return function(typed(config), plain_settings(config))
        except KeyboardInterrupt as interrupt:
            _say_how(interrupt)
            sys.exit(_status(interrupt))
        except SystemExit as end:
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            _say_how(end.__context__)  # Lightning has caught it, and ends with status 1
            sys.exit(_status(end.__context__))
        except Exception as error:
            if not _is_for_the_user(error):
                raise
            if not isinstance(error, NotFiniteError) or rank_from_environment() == 0:  # every rank raises the same
                print(f"error: {error}", file=sys.stderr, flush=True)
            lasting = isinstance(error, UserError | PermissionError) or config.role == "auto"
            sys.exit(BAD_SETTINGS if lasting else RETRYABLE)
        finally:
            if not keeps_folder and not is_multirun():
                _remove_unused(Path(HydraConfig.get().runtime.output_dir))

    @wraps(function)
    def checked() -> None:
        _check_choices(sys.argv[1:])
        _register_settings(sys.argv[1:])
        ClaimRun.wanted = owns_folder
        signal.signal(signal.SIGTERM, terminate)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's background job has it
            signal.signal(signal.SIGINT, break_off)
        report, sys.unraisablehook = sys.unraisablehook, _raise_again
        try:
            run()
        except KeyboardInterrupt as interrupt:  # before the command began, or a second one while the first was answered
            sys.exit(_status(interrupt))
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)  # nothing is left to be freed, nor anything to be told
            sys.unraisablehook = report

    return checked


def _raise_again(dropped: "sys.UnraisableHookArgs") -> None:
    """An interrupt that met a `__del__`, where Python drops and shows what is raised, comes again a moment later."""
    if not isinstance(dropped.exc_value, KeyboardInterrupt):
        return sys.__unraisablehook__(dropped)
    number = signal.SIGINT
    if isinstance(dropped.exc_value, Terminated):
        number = signal.SIGTERM
        signal.signal(number, terminate)
    threading.Timer(AGAIN_S, _thread.interrupt_main, (number,)).start()


def _say_how(interrupt: KeyboardInterrupt) -> None:
    print("terminated" if isinstance(interrupt, Terminated) else "interrupted", file=sys.stderr, flush=True)


def _status(interrupt: KeyboardInterrupt) -> int:
    return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message says all there is to say; otherwise the traceback does."""
    if isinstance(error, UserError | CapacityError | PermissionError | PeerFailedError | PeerTimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    foreign = (
        ("lightning_dataflow.stores", "StoreUnavailableError"),
        ("lightning.pytorch.utilities.exceptions", "MisconfigurationException"),
    )
    return any(isinstance(error, getattr(sys.modules[module], name)) for module, name in foreign if module in sys.modules)


def _check_choices(overrides: Sequence[str]) -> None:
    """Name the choices of a group in one line; Hydra's own message takes several. Folders of the user's are Hydra's."""
    if any("hydra.searchpath" in override or override.startswith(CONFIG_DIR_FLAGS) for override in overrides):
        return
    root = files("lightning_dataflow.conf")
    for group, _, choice in (override.lstrip("+~").partition("=") for override in overrides):
        folder = root / group
        if group.isidentifier() and choice and folder.is_dir():
            there = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())
            for name in choice.split(","):
                if name not in there and name != "null":
                    print(f"error: {group}={name} is unknown: available are {', '.join(there)}", file=sys.stderr)
                    sys.exit(1)


def _register_settings(arguments: Sequence[str]) -> None:
    """What Hydra cannot read from files; the shipped strategies come last, as Hydra also prefers their files."""
    try:
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
            flag, equals, folder = argument.partition("=")
            if flag in CONFIG_DIR_FLAGS:
                register_conditions(Path(folder if equals else following))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_SETTINGS)
    register_schemas()


def typed(config: DictConfig) -> TrainConfig:
    """Dataclasses instead of omegaconf's containers: no library module sees those.

    Raises:
        UserError: a value is missing; there is a key that nothing reads, which `+key=…` adds even to what is typed; or
            another Trainer is asked for.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}: set it on the command line, for example {missing[0]}=…")
    made: TrainConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    for prefix, name, known in _unread(made):
        near = difflib.get_close_matches(name, known)
        hint = "did you mean" if near else "available are"
        names = ", ".join(prefix + one for one in near or known)
        raise UserError(f"there is no setting {prefix}{name}: {hint} {names}")
    if (target := made.trainer.get("_target_")) not in (None, *TRAINERS):
        raise UserError(
            f"trainer._target_={target}: the Trainer is always Lightning's, so leave {TRAINERS[0]} and set its arguments, "
            "or use your own in a script (recipes/plain_lightning)"
        )
    return made


def _unread(node: Any, prefix: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Keys that are not in the schema: where each is, its name, and the names that are there."""
    known = [field.name for field in dataclasses.fields(node)]
    for name, value in vars(node).items():
        if name not in known:
            yield prefix, name, known
        elif dataclasses.is_dataclass(value):
            yield from _unread(value, f"{prefix}{name}.")


def plain_settings(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration, for `result.json`. It holds no secrets, only the names of files that do."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def is_multirun() -> bool:
    """Whether this is a job of `-m`."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def job_arguments() -> list[str]:
    """This job's overrides, and where its configuration is found: what another process needs to run it."""
    found = HydraConfig.get()
    sources = [source.path for source in found.runtime.config_sources if source.provider == "command-line"]
    return [*(f"--config-dir={path}" for path in sources), *found.overrides.task]


def _remove_unused(folder: Path) -> None:
    """Unless the folder holds more than Hydra's copy of the settings and an empty log."""
    written = [path for path in folder.rglob("*") if path.is_file()]
    if all(path.parent.name == ".hydra" or (path.suffix == ".log" and not path.stat().st_size) for path in written):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # others are in there
            folder.parent.rmdir()


def _check_run_name() -> None:
    """Ranks that torchrun or SLURM start would each name the run by their own clock."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS") or 1) > 1
    overrides = HydraConfig.get().overrides
    named = any(one.startswith(("run_name=", "hydra.run.dir=")) for one in (*overrides.task, *overrides.hydra))
    if launched and not named:
        raise UserError("ranks started by torchrun or SLURM need one name for their run: add run_name=…")
    role = HydraConfig.get().runtime.choices.get("role")
    if role != "auto" and not named:
        raise UserError(f"role={role} is one part of a run that has other parts: add run_name=…, the same for all of them")
    if role == "auto" and launched and str(HydraConfig.get().runtime.choices.get("topology")).startswith("disagg_"):
        raise UserError(
            "torchrun or SLURM starts trainers, each of which would start a run of its own: add role=trainer, and start "
            "producers with role=producer"
        )


def log_once() -> None:
    """Lightning installs handlers of its own when it is imported; without them its messages reach Hydra's, once."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
