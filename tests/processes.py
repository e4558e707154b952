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
"""A busy machine may take this many times as long as an idle one."""


def slow(*values: Any) -> Any:
    """A case of a test that CI runs, and the default suite does not."""
    return pytest.param(*values, marks=pytest.mark.slow)


def nightly(*values: Any) -> Any:
    """A case of a test that shows nearly what another case shows: only the nightly tests run it."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def environment() -> dict[str, str]:
    """The environment of a command under test. One thread a process: two ranks must not compete for two cores."""
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
    processes = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == folder:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    processes[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # the process has just ended
            continue
    return processes


def restore_sigint() -> None:
    """For `preexec_fn`: background jobs of a shell, and their children, ignore SIGINT unless it is restored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], object], timeout_s: float, shown: Callable[[], str]) -> None:
    """Wait until `condition` holds; fail with the text of `shown` after BUSY times `timeout_s`."""
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
)


def with_strategy(settings: Sequence[str], strategy: str) -> tuple[str, ...]:
    """The same settings for another strategy."""
    return (*(setting for setting in settings if not setting.startswith("strategy=")), f"strategy={strategy}")
