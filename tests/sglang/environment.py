"""Stock SGLang on a CPU, in the environment that scripts/sglang_cpu.sh builds."""

import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT, environment

FLAGS = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "dtype": "float32",
    "mem-fraction-static": "0.1",
    "max-total-tokens": "4096",
    "max-running-requests": "8",
    "grammar-backend": "none",
    "sampling-backend": "pytorch",
}
ARGUMENTS = [part for name, value in FLAGS.items() for part in (f"--{name}", value)]
ARGUMENTS += ["--disable-overlap-schedule", "--skip-server-warmup", "--sleep-on-idle"]
# PYTHONPATH: the environment is shared by checkouts, and may point at another one.
VARIABLES = {**environment(), "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(ROOT)}


def sglang_python() -> Path:
    """The environment's Python. Skips the test where there is none."""
    where = subprocess.run(
        ["bash", str(ROOT / "scripts/sglang_cpu.sh"), "--where"], capture_output=True, text=True, check=True
    )
    python = Path(where.stdout.strip()) / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with SGLang: build it with `bash scripts/sglang_cpu.sh`")
    return python
