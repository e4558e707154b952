"""What all commands share: configuration, one-line errors, and an orderly end after Ctrl-C."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from lightning_dataflow.cli.printable_log import log_printable
from lightning_dataflow.cli.private_files import private_files, share_files
from lightning_dataflow.config.conditions import drop_conditions
from lightning_dataflow.config.parsing import check_choices, parse_config, register_settings
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import CapacityError, NotFiniteError, PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.contracts.errors import BAD_SETTINGS, INTERRUPTED, RETRYABLE, TERMINATED
from lightning_dataflow.contracts.folders import KeptFolder
from lightning_dataflow.contracts.foreign import first_line, one_line
from lightning_dataflow.run.claim import claim
from lightning_dataflow.run.ranks import rank_from_environment
from lightning_dataflow.run.signals import Terminated, signals_interrupt

MAX_ERROR = 2000
OF_FILE_SYSTEMS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EISDIR, errno.ENOTDIR)
"""Errors that have nothing to do with the command; the last two name the path."""
WRONG_SETTINGS = UserError | PermissionError | IsADirectoryError | NotADirectoryError
"""Errors that the same command would meet again."""
MISCONFIGURATION = "MisconfigurationException"
"""Lightning's error for wrong settings."""

Command = Callable[[TrainConfig], Any]


class ClaimRun(Callback):
    """Claims the run's folder before Hydra writes its settings and its log there.

    Rank 0 claims for all ranks. Producers have folders of their own, and any number of them may join a run.

    Attributes:
        wanted: whether the command of this process owns the folder of its run.
    """

    wanted = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The folder of a sweep, too, can be shared."""
        share_files(config.shared_files)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exits with one line where another process owns the folder, or the log cannot be opened: Hydra drops exceptions of
        its hooks."""
        share_files(config.shared_files)
        try:
            if self.wanted and config.role != "producer":
                self._claim(config)
            if (log := Path(config.hydra.run.dir) / f"{config.hydra.job.name}.log").is_dir():
                raise UserError(f"the log {log} is a folder: move it away, or choose another run_name")
        except UserError as error:
            _exit(error, config.role)

    def _claim(self, config: DictConfig) -> None:
        if rank_from_environment() > 0:
            with read_write(config.hydra):
                config.hydra.output_subdir = None  # else it would write the settings before rank 0 has the claim
            return
        with read_write(config.hydra):  # Hydra does the same later; `run_dir` refers to it
            config.hydra.runtime.output_dir = str(Path(config.hydra.run.dir).absolute())
        HydraConfig.instance().set_config(config)
        advice = "choose another run_name; or end that process, or wait for it, and resume with ckpt_path=last"
        for folder in dict.fromkeys((config.hydra.run.dir, config.run_dir)):
            claim(Path(folder), advice)


def command(function: Command, *, keeps_folder: bool = True, owns_folder: bool = False) -> Callable[[], None]:
    """Make a Hydra command of a function that takes the typed configuration.

    Args:
        keeps_folder: keep Hydra's output folder even if nothing was written into it.
        owns_folder: lock that folder against other commands; see ClaimRun.
    """

    @hydra.main(version_base="1.3", config_path="pkg://lightning_dataflow.conf", config_name="train")
    @wraps(function)
    def run(config: DictConfig) -> Any:
        log_printable()
        home: KeptFolder | None = None
        try:
            drop_conditions(config)
            parsed = parse_config(config)
            _check_run_name(parsed)
            home = KeptFolder(parsed.run_dir)
            if parsed.target.trust_remote_code:
                from lightning_dataflow.targets.info import trust_remote_code  # takes seconds

                trust_remote_code(parsed.target.path)
            return function(parsed)
        except BaseException as error:
            _exit(error if home is None else _explained_by(home, error), config.role)
        finally:
            if not keeps_folder and not is_multirun():
                _remove_unused(Path(HydraConfig.get().runtime.output_dir))

    @wraps(function)
    def main() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself, in several lines
        ClaimRun.wanted = owns_folder
        with signals_interrupt(), private_files():
            try:
                check_choices(sys.argv[1:])
                register_settings(sys.argv[1:])
                run()
            except (UserError, KeyboardInterrupt) as error:  # before the command began, or a second Ctrl-C
                _exit(error, "auto")
            except HydraException as error:
                _exit(UserError(_of_composition(error)), "auto")

    return main


def _of_composition(error: HydraException) -> str:
    """What is wrong with a setting on the command line or with a file of settings."""
    return f"{error} ({first_line(error.__cause__)})" if error.__cause__ else str(error)


def _exit(error: BaseException, role: str) -> NoReturn:
    """Exit with one line; an error that needs more is raised again."""
    cause = error.__context__ if isinstance(error, SystemExit) else error  # Lightning catches interrupts, and exits
    if isinstance(cause, KeyboardInterrupt):
        ended, status = ("terminated", TERMINATED) if isinstance(cause, Terminated) else ("interrupted", INTERRUPTED)
        print(ended, file=sys.stderr, flush=True)
        sys.exit(status)
    if not _is_explained(error):
        raise error
    if not isinstance(error, NotFiniteError) or rank_from_environment() == 0:  # every rank raises the same
        print(f"error: {one_line(error, MAX_ERROR)}", file=sys.stderr, flush=True)
    sys.exit(RETRYABLE if role != "auto" and _is_retryable(error) else BAD_SETTINGS)


def _explained_by(home: KeptFolder, error: BaseException) -> BaseException:
    """Whatever failed: that the folder is gone, if it is."""
    if isinstance(error, Exception):
        try:
            home.check()
        except UserError as moved:
            moved.__cause__ = error
            return moved
    return error


def _is_explained(error: BaseException) -> bool:
    """Whether the message says all there is to say; other errors show a traceback."""
    if isinstance(error, UserError | CapacityError | PermissionError | PeerFailedError | PeerTimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in OF_FILE_SYSTEMS:
        return True
    return type(error).__name__ in ("StoreUnavailableError", MISCONFIGURATION)  # by name: importing them takes seconds


def _is_retryable(error: BaseException) -> bool:
    """Whether the same command may succeed later. With wrong settings it would fail again."""
    return not isinstance(error, WRONG_SETTINGS) and type(error).__name__ != MISCONFIGURATION


def is_multirun() -> bool:
    """Whether this is a job of `-m`."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def job_arguments() -> list[str]:
    """This job's overrides, and where its configuration is found: what another process needs to run it."""
    job = HydraConfig.get()
    sources = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    return [*(f"--config-dir={path}" for path in sources), *job.overrides.task]


def _remove_unused(folder: Path) -> None:
    """Delete the folder if it holds only Hydra's copies of the settings and the log."""
    log = f"{HydraConfig.get().job.name}.log"
    written = [path for path in folder.rglob("*") if path.is_file()]
    if all(path.parent.name == ".hydra" or path.name == log for path in written):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other runs are in there
            folder.parent.rmdir()


def _check_run_name(config: TrainConfig) -> None:
    """Raise UserError where each process of the run would make up a name of its own from the time."""
    overrides = HydraConfig.get().overrides
    named = any(override.startswith(("run_name=", "hydra.run.dir=")) for override in (*overrides.task, *overrides.hydra))
    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS") or 1) > 1
    if not named and (launched or (config.trainer.get("num_nodes") or 1) > 1):
        launcher = "by torchrun or SLURM" if launched else "on several nodes"
        raise UserError(f"ranks started {launcher} need one name for their run: add run_name=…")
    if not named and config.role != "auto":
        raise UserError(f"role={config.role} runs one process of a larger run: add run_name=…, the same for every process")
    if launched and config.role == "auto" and config.topology.is_disaggregated:
        raise UserError(
            "torchrun or SLURM starts trainers, each of which would start a run of its own: add role=trainer, and start "
            "producers with role=producer"
        )
