"""The model card's sections on how a draft was trained, from its checkpoint and its run's `result.json`."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

DECODING = ("temperature", "max_new_tokens")
"""Settings of a measurement that its numbers depend on."""

_NOT_SETTINGS = ("target", "init_from", "network", "layer_ids", "_instantiator")
_MEASURED = "Mean tokens per verification on held-out prompts, by lightning_dataflow's own speculative decoding."


def training_sections(checkpoint: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Markdown. `checkpoint` may lack its tensors; `result` is empty where there is none. Unknown rows are left out.

    Counted up to the step of the checkpoint: samples, those of later passes again, and their tokens over all ranks.
    """
    hparams = checkpoint["hyper_parameters"]
    settings = {name: value for name, value in hparams.items() if name not in _NOT_SETTINGS and value is not None}
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    return [
        "## Training\n\n" + table(_rows(checkpoint, result)),
        "Settings:\n\n" + table(settings),
        *([f"Trained with {versions}."] if versions else []),
        "## Acceptance\n\n" + _acceptance(checkpoint, result),
    ]


def table(rows: Mapping[str, object]) -> str:
    """A table of two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _rows(checkpoint: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, object]:
    data, losses = checkpoint.get("DataFlowDataModule", {}), [float(loss) for loss in checkpoint.get("step_losses", [])]
    rows = {
        "optimizer steps": int(checkpoint["global_step"]),
        "started from the draft": _name(checkpoint["hyper_parameters"].get("init_from")),
        "samples": data.get("next_seq"),
        "samples a step": data.get("global_batch_size"),
        "tokens": checkpoint.get("callbacks", {}).get("RunMetrics", {}).get("num_tokens"),
        "loss, first and last step": f"{losses[0]:.4g}, {losses[-1]:.4g}" if losses else None,
        "data": _data(_settings(result, "data").get("path")) or None,
        "precision": result.get("precision") or None,
    }
    return {name: value for name, value in rows.items() if value is not None}


def _acceptance(checkpoint: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    evaluate, own = _settings(result, "evaluate"), checkpoint.get("callbacks", {}).get("AcceptanceEvaluation", {})
    measured = result.get("acceptance") or own.get("history", [])
    measured = [entry for entry in measured if entry["step"] <= int(checkpoint["global_step"])]
    if not measured:
        return "Not measured."
    lines = [
        "| step | prompts | temperature | new tokens, at most | drafted at a time | acceptance length "
        "| accepted at least up to position 1, 2, … |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in measured:
        shares = [f"{share:.3f}" for share in entry["acceptance_per_position"]]
        decoding = [entry.get(name, evaluate.get(name, "not recorded")) for name in DECODING]
        length = f"{entry['acceptance_length']:.3f}"
        row = [entry["step"], entry["num_prompts"], *decoding, len(shares), length, ", ".join(shares)]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return f"{_MEASURED}\n\n" + "\n".join(lines)


def _settings(result: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    settings = result.get("settings", {}).get(group, {})
    return settings if isinstance(settings, dict) else {}


def _name(path: Any) -> str | None:
    return None if path is None else PurePath(str(path)).name


def _data(path: Any) -> str | None:
    """As it was given, but nobody is told where it lay on the machine."""
    return _name(path) if PurePath(str(path)).is_absolute() else path
