"""Every golden case: one training step of one objective, made by an independent implementation.

`GOLDEN_DIR=<folder> python -m pytest tests/golden` runs the cases of another folder.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.golden.cases import RUNNERS, Golden

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent))
CASES = sorted(FOLDER.glob("*.safetensors"))


def test_the_folder_has_cases():
    assert CASES, f"no golden cases in {FOLDER}"


def load(path: Path) -> Golden:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Golden(config=json.loads(file.metadata()["config"]), tensors=tensors)


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a − b| / max |b|."""
    found, expected = found.detach().double(), expected.double()
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path: Path):
    objective = path.stem.split("_")[0]
    if objective not in RUNNERS:
        pytest.skip(f"no {objective} objective in this release")
    golden = load(path)
    outputs, gradients = RUNNERS[objective](golden)
    for name, value in outputs.items():
        assert worst(value, golden.tensors[f"out.{name}"]) < 1e-5, name
    expected = {name.removeprefix("grad.") for name in golden.tensors if name.startswith("grad.")}
    assert set(gradients) == expected
    for name, value in gradients.items():
        assert worst(value, golden.tensors[f"grad.{name}"]) < 2e-4, name
