"""The check that runs on a GPU, on the CPU at its smallest."""

import math

import pytest

from benchmarks import gpu_check

SHAPE = (40, (9, 3))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "packed"), [("eagle3", False), ("domino", True), pytest.param("dflash", True, marks=pytest.mark.slow)]
)
def test_a_row_for_each_precision(capsys, name, packed):
    assert gpu_check.check(name, SHAPE, packed, gpu_check.SMALL, "cpu")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [row[4].strip() for row in rows] == ["float32", "bf16-mixed"]
    assert float(rows[0][7]) == 0 < float(rows[1][7])  # float32 is compared with itself here


@pytest.mark.integration
@pytest.mark.parametrize("error", [1.0, math.nan])
def test_a_wrong_gradient_is_reported(capsys, monkeypatch, error):
    """Of the last parameter, and in one precision alone."""
    step = gpu_check.step

    def wrong(draft, batch, precision):
        result = step(draft, batch, precision)
        if precision == "bf16-mixed":
            result["norm.weight"] = result["norm.weight"] + error
        return result

    monkeypatch.setattr(gpu_check, "step", wrong)
    assert not gpu_check.check("dflash", SHAPE, False, gpu_check.SMALL, "cpu")
    assert capsys.readouterr().out.count("**too large**") == 1
