"""Hydra multirun: every job in a fresh process, and a table of their results at the end."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lightning_dataflow.config.parsing import quoted
from lightning_dataflow.contracts import UserError

STATUS_WIDTH = 60
COLUMNS = ("loss", "acceptance", "tokens/s", "status")


def run_job(arguments: Sequence[str], folder: Path, metric: str) -> float:
    """Train in a process of its own and return `metric` of its `result.json`.

    Lightning starts further ranks with the command line of their parent. That of a multirun would begin the whole sweep
    again in each rank; that of a job's process holds the values of this job. Variables of SLURM are removed, so that the
    process starts its ranks itself.

    Raises:
        UserError: the job failed, or has no such metric.
    """
    command = [sys.executable, "-m", "lightning_dataflow", "train", *arguments, f"hydra.run.dir={quoted(folder)}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
    status = subprocess.run(command, stdin=subprocess.DEVNULL, env=environment).returncode
    if status:
        raise UserError(f"the job in {folder} ended with status {status}: see its messages above")
    return read_metric(json.loads((folder / "result.json").read_text()), metric)


def read_metric(result: dict[str, Any], metric: str) -> float:
    """A value of `result.json`: `loss`, `acceptance_length`, or a name below `metrics`. Raises UserError for others."""
    known = dict(result["metrics"])
    if result["losses"]:
        known["loss"] = result["losses"][-1]
    if result.get("acceptance"):
        known["acceptance_length"] = result["acceptance"][-1]["acceptance_length"]
    if metric not in known:
        raise UserError(f"sweep_metric={metric} is not in the results: available are {', '.join(sorted(known))}")
    if known[metric] is None:
        raise UserError(f"sweep_metric={metric} is NaN or infinity in the results: sweep over other values")
    return float(known[metric])


class ResultsTable(Callback):
    """Prints one line for each job of a multirun."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        print("\n".join(table(folder)), flush=True)


def table(folder: Path) -> list[str]:
    """A header, and a row for each job in `folder`."""
    jobs = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    overrides = [_overrides(job) for job in jobs]
    common = set.intersection(*map(set, overrides)) if len(jobs) > 1 else set()
    rows: list[tuple[str, ...]] = [("job", *COLUMNS, "settings")]
    for job, chosen in zip(jobs, overrides, strict=True):
        own = " ".join(override for override in chosen if override not in common)
        rows.append((job.name, *_cells(job / "result.json"), own))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, f"results in {folder}"]


def _overrides(job: Path) -> list[str]:
    path = job / ".hydra" / "overrides.yaml"
    return [line.removeprefix("- ") for line in path.read_text().splitlines()] if path.exists() else []


def _cells(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return ("", "", "", "failed")
    result = json.loads(path.read_text())
    acceptance = result.get("acceptance") or []
    return (
        _shown(result["losses"][-1], 4) if result["losses"] else "",
        _shown(acceptance[-1]["acceptance_length"], 3) if acceptance else "",
        _shown(result["throughput"].get("tokens_per_second", 0), 0),
        shorten(result["status"], STATUS_WIDTH, placeholder=" …"),
    )


def _shown(number: float | None, digits: int) -> str:
    return "not finite" if number is None else f"{number:.{digits}f}"
