"""The check that runs on a GPU, on the CPU at its smallest."""

import pytest

from benchmarks import gpu_check


@pytest.mark.parametrize("name", gpu_check.DRAFTS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_for_each_precision(capsys, name, packed):
    assert gpu_check.check(name, 40, packed, gpu_check.SMALL, "cpu")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [row[3].strip() for row in rows] == ["float32", "bf16-mixed"]
    assert float(rows[0][6]) == 0 < float(rows[1][6])  # float32 is compared with itself here


def test_an_error_above_its_limit_is_told(capsys, monkeypatch):
    monkeypatch.setitem(gpu_check.LIMITS, "bf16-mixed", (1e-2, 1e-6))
    assert not gpu_check.check("dflash", 40, False, gpu_check.SMALL, "cpu")
    assert capsys.readouterr().out.count("**too large**") == 1
