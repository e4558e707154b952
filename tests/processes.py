"""Starting the project's commands as a user does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BUSY = 3
"""How many times as long as an idle machine a busy one may take."""


def long(*values: Any) -> Any:
    """A case of a test that takes its time and shows nearly what another does: `-m slow` runs it, CI does not."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.long])


def environment() -> dict[str, str]:
    """One thread a process keeps two ranks from fighting for two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def python(
    *arguments: str, cwd: Path, timeout_s: float = 600, status: int = 0, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` in `cwd` and check the exit status."""
    command, env = [sys.executable, *arguments], environment() | (variables or {})
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert result.returncode == status, f"{command} exited {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def torchrun(*arguments: str, cwd: Path, num_ranks: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script on `num_ranks` ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}")
    return python(*launcher, *arguments, cwd=cwd, **options)


def processes_in(folder: Path) -> dict[int, str]:
    """Processes whose working directory is `folder`, by id, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == folder:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
    return found


def heed_ctrl_c() -> None:
    """In a child before it runs its command: a background job of a shell, and all below it, would ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], object], timeout_s: float, shown: Callable[[], str]) -> None:
    """Fail with what is `shown` unless `condition` comes true in `timeout_s` of an idle machine; a busy one has longer."""
    deadline = time.monotonic() + BUSY * timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {BUSY * timeout_s} s: {shown()}"
        time.sleep(0.05)


def result(cwd: Path, run_name: str) -> dict[str, Any]:
    """`result.json` of a run."""
    return json.loads((cwd / "runs" / run_name / "result.json").read_text())


TRAIN = str(ROOT / "train.py")
TINY = (
    "strategy=eagle3",
    "experiment=tiny",
    "logger=none",
    "callbacks=no_evaluation",
    "hydra.job_logging.root.level=ERROR",
)


def with_strategy(settings: Sequence[str], strategy: str) -> tuple[str, ...]:
    """The same settings for another strategy."""
    return (*(one for one in settings if not one.startswith("strategy=")), f"strategy={strategy}")
