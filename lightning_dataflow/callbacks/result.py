"""`result.json`: what a run was, did and measured."""

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dataflow.callbacks.acceptance import AcceptanceEvaluation
from lightning_dataflow.callbacks.early import EarlyCheckpoints
from lightning_dataflow.callbacks.metrics import RunMetrics
from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError, strict_json

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
    """Writes `result.json` when training ends, also when it ends by an exception or Ctrl-C.

    Losses, counts and rates of a resumed run are those of the whole run: what came before is in the checkpoint.

    Args:
        folder: where; the logger's folder by default.
        settings: written along, for example the resolved configuration.

    Attributes:
        path: of the file; None until training starts.
    """

    def __init__(self, folder: str | None = None, settings: Mapping[str, Any] | None = None):
        self.folder = folder
        self.settings = settings
        self.path: Path | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook. `trainer.log_dir` is a collective, so it is asked for here, on every rank."""
        self.path = Path(self.folder or trainer.log_dir or trainer.default_root_dir) / "result.json"

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook."""
        self._write(trainer, pl_module, "completed")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lightning's hook."""
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        says_all = isinstance(exception, UserError | PeerFailedError | PeerTimeoutError)
        status = "interrupted" if interrupted else f"failed: {exception if says_all else type(exception).__name__}"
        try:
            self._write(trainer, pl_module, status)
        except OSError as error:  # the exception at hand says more
            print(f"no result was written: {error}", flush=True)

    def _write(self, trainer: L.Trainer, pl_module: Any, status: str) -> None:
        if self.path is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_result(self.path, self._result(trainer, pl_module, status))

    def _result(self, trainer: L.Trainer, pl_module: Any, status: str) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        skipped = Counter(data.source.card.skipped) + Counter(data.skipped().values())
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        metrics = next((callback for callback in callbacks if isinstance(callback, RunMetrics)), None)
        reports = [callback.report() for callback in callbacks if isinstance(callback, AcceptanceEvaluation)]
        result = {
            "status": status,
            "strategy": pl_module.strategy_name,
            "optimizer_steps": trainer.global_step,
            "losses": [float(loss) for loss in pl_module.step_losses],
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            **asdict(data.batching),
            "world_size": trainer.world_size,
            "precision": trainer.precision,
            "samples_per_pass": len(data.source),
            "samples_trained": data.next_seq - sum(seq < data.next_seq for seq in data.skipped()),
            "samples_skipped": sum(skipped.values()),
            "samples_skipped_by_reason": dict(skipped),
            "seqs_skipped_while_training": sorted(data.skipped()),
            "samples_recaptured": data.num_recaptured(),
            "stopped_early": _stopping_reason(trainer),
            "early_checkpoints": sum(one.count for one in callbacks if isinstance(one, EarlyCheckpoints)),
            "throughput": metrics.totals(data.next_seq) if metrics else {},
            "versions": _versions(),
            "settings": self.settings or dict(pl_module.hparams),
        }
        for report in reports:
            result |= report
        return result


def _stopping_reason(trainer: L.Trainer) -> str | None:
    """What an EarlyStopping said; None where training went to its end."""
    reasons = [callback.stopping_reason_message for callback in trainer.early_stopping_callbacks if trainer.should_stop]
    return next((reason for reason in reasons if reason), None)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` to `path`, all of it or nothing; a number that is not finite as null."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(strict_json(result, indent=1) + "\n")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
