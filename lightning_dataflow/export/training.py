"""How a draft was trained, from its checkpoint and its run's `result.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

DECODING = ("temperature", "max_new_tokens")
"""Settings of a measurement that its numbers depend on."""

_NOT_SETTINGS = ("target", "init_from", "network", "layer_ids", "_instantiator")


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What a model card tells of a training. What is not known is None, or empty.

    Attributes:
        samples: read up to this step, those of later passes counted again.
        tokens: of these samples, over all ranks.
        init_from: name of the draft that it began with.
        settings: of the LightningModule.
        acceptance: measurements up to this step, as in `result.json`, with DECODING where that is known.
    """

    strategy: str
    steps: int
    losses: Sequence[float]
    samples: int | None
    global_batch_size: int | None
    tokens: int | None
    data: str | None
    precision: str | None
    init_from: str | None
    settings: Mapping[str, Any]
    acceptance: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], result: Mapping[str, Any]) -> "TrainingRecord":
        """From a checkpoint without its tensors, and `result.json` where there is one."""
        steps = int(checkpoint["global_step"])
        data = checkpoint.get("DataFlowDataModule", {})
        callbacks = checkpoint.get("callbacks", {})
        measured = result.get("acceptance") or callbacks.get("AcceptanceEvaluation", {}).get("history", [])
        settings = {name: value for name, value in checkpoint["hyper_parameters"].items() if name not in _NOT_SETTINGS}
        configured = result.get("settings", {}).get("data", {})
        path = str(configured["path"]) if isinstance(configured, dict) and "path" in configured else None
        evaluated = result.get("settings", {}).get("evaluate", {})
        decoding = {name: evaluated[name] for name in DECODING if isinstance(evaluated, dict) and name in evaluated}
        start = checkpoint["hyper_parameters"].get("init_from")
        return cls(
            strategy=checkpoint["strategy"],
            steps=steps,
            losses=[float(loss) for loss in checkpoint.get("step_losses", [])],
            samples=data.get("next_seq"),
            global_batch_size=data.get("global_batch_size"),
            tokens=callbacks.get("RunMetrics", {}).get("num_tokens"),
            data=path if path is None or not PurePath(path).is_absolute() else PurePath(path).name,
            precision=result.get("precision"),
            init_from=None if start is None else PurePath(str(start)).name,
            settings=settings,
            acceptance=[decoding | one for one in measured if one["step"] <= steps],
            versions=result.get("versions", {}),
        )
