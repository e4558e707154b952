"""`result.json`: what a run was, did and measured."""

import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import orjson
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dataflow.callbacks.acceptance import AcceptanceEvaluation
from lightning_dataflow.callbacks.early import EarlyCheckpoints
from lightning_dataflow.callbacks.metrics import RunMetrics
from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.contracts.folders import KeptFolder

log = logging.getLogger(__name__)

PACKAGES = (
    "lightning-dataflow",
    "lightning",
    "torch",
    "transformers",
    "safetensors",
    "hydra-core",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-non-cuda",
)


class ResultWriter(L.Callback):
    """Writes `result.json` when training ends, also by an exception or Ctrl-C.

    Losses, counts and rates of a resumed run cover the whole run: the checkpoint holds those of the earlier fits.

    Args:
        folder: the logger's folder by default.
        settings: included in the file, for example the resolved configuration.

    Attributes:
        path: of the file; None until training starts.
    """

    def __init__(self, folder: str | None = None, settings: Mapping[str, Any] | None = None):
        self.folder = folder
        self.settings = settings
        self.path: Path | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder here, on every rank: `trainer.log_dir` is a collective."""
        self.path = Path(self.folder or trainer.log_dir or trainer.default_root_dir) / "result.json"
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._home = KeptFolder(self.path.parent)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "completed")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        is_explained = isinstance(exception, UserError | PeerFailedError | PeerTimeoutError)
        status = "interrupted" if interrupted else f"failed: {exception if is_explained else type(exception).__name__}"
        try:
            self._write(trainer, pl_module, status)
        except (OSError, TypeError, UserError) as error:  # must not hide the exception that ended the run
            log.warning(f"no result was written: {error}")

    def _write(self, trainer: L.Trainer, pl_module: Any, status: str) -> None:
        if self.path is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._home.check()
        write_result(self.path, self._result(trainer, pl_module, status))

    def _result(self, trainer: L.Trainer, pl_module: Any, status: str) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        skipped_seqs = data.skipped()
        skipped = Counter(data.source.card.skipped) + Counter(skipped_seqs.values())
        metrics = _callback(trainer, RunMetrics)
        early, evaluation = _callback(trainer, EarlyCheckpoints), _callback(trainer, AcceptanceEvaluation)
        return {
            "status": status,
            "strategy": pl_module.strategy_name,
            "optimizer_steps": trainer.global_step,
            "losses": [float(loss) for loss in pl_module.step_losses],
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            **asdict(data.batching),
            "world_size": trainer.world_size,
            "precision": trainer.precision,
            "records_per_pass": data.source.card.num_records,
            "samples_per_pass": len(data.source),
            "samples_trained": data.next_seq - len(skipped_seqs),
            "samples_not_reached_in_the_last_pass": -data.next_seq % len(data.source),
            "samples_skipped": sum(skipped.values()),
            "samples_skipped_by_reason": dict(skipped),
            "seqs_skipped_while_training": sorted(skipped_seqs),
            "samples_recaptured": data.num_recaptured(),
            "stopped_early": _stopping_reason(trainer),
            "early_checkpoints": early.count if early else 0,
            "throughput": metrics.rates(data.next_seq) if metrics else {},
            "versions": _versions(),
            "settings": self.settings or dict(pl_module.hparams),
            **({"acceptance": evaluation.history} if evaluation else {}),
        }


def _callback(trainer: L.Trainer, kind: type[L.Callback]) -> Any:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _stopping_reason(trainer: L.Trainer) -> str | None:
    """What an EarlyStopping said; None if training ran to its end."""
    reasons = [callback.stopping_reason_message for callback in trainer.early_stopping_callbacks if trainer.should_stop]
    return next((reason for reason in reasons if reason), None)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` to `path` atomically; numbers that are not finite become null."""
    part = path.with_name(f".{path.name}.part")
    try:
        options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
        part.write_bytes(orjson.dumps(result, _plain, options))
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """For settings that are no plain data: subclasses of float and tuple, numbers of numpy, mappings of OmegaConf."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
