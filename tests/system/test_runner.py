"""The runner of the tests itself."""

import signal
import subprocess
import sys

import pytest

from tests.processes import environment, processes_in, wait_until

SLEEPER = """
import pathlib, subprocess, sys, pytest
from lightning_dataflow.cli import train

def test_sleep(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "topology=nowhere"])
    with pytest.raises(SystemExit):
        train.main()  # has signal handlers of its own while it runs
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        try:
            pathlib.Path("started").touch()  # an interrupt inside Popen, though the child may run, would leave it behind
            child.wait()
        finally:
            child.kill()
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "workers"])
def test_sigterm_ends_the_tests_and_what_they_started(tmp_path, workers):
    (tmp_path / "test_sleep.py").write_text(SLEEPER)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", *workers]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)

    def shown() -> str:
        return f"{processes_in(tmp_path)}\n{(tmp_path / 'log').read_text()}"

    wait_until((tmp_path / "started").exists, 30, shown)
    run.send_signal(signal.SIGTERM)
    wait_until(lambda: run.poll() is not None, 20, shown)
    wait_until(lambda: not processes_in(tmp_path), 5, shown)
    assert run.returncode == pytest.ExitCode.INTERRUPTED, shown()
