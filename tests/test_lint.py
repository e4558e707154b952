"""Style and types. As tests they run beside the others, on a worker of their own."""

import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.parametrize("command", ["mypy", "ruff check", "ruff format --check"])
def test_lint(command):
    result = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
