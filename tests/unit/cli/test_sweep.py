"""Results of jobs, also those that are not finite."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_dataflow.callbacks.result import write_result
from lightning_dataflow.cli.figure import draw_result
from lightning_dataflow.cli.sweep import read_metric, run_job, table
from lightning_dataflow.contracts import UserError

RESULT = {
    "status": "failed: step 2, of samples " + "00000074, " * 20,
    "strategy": "eagle3",
    "losses": [4.5, float("nan")],
    "metrics": {"train/lr": float("inf"), "train/accuracy": 0.25},
    "throughput": {"tokens_per_second": 812.4},
}


@pytest.fixture
def result(tmp_path):
    folder = tmp_path / "0"
    folder.mkdir()
    write_result(folder / "result.json", RESULT)
    return folder / "result.json"


def test_the_table_stands_a_loss_that_is_not_finite(result, tmp_path):
    _, row, _ = table(tmp_path)
    assert row.split()[:4] == ["0", "not", "finite", "812"]
    assert len(row) < 120, "the status is cut"


def test_a_metric_that_is_not_finite_is_one_line(result):
    found = json.loads(result.read_text())
    assert read_metric(found, "train/accuracy") == 0.25
    for name in ("loss", "train/lr"):
        with pytest.raises(UserError, match=f"sweep_metric={name} is NaN or infinity in the results"):
            read_metric(found, name)


def test_the_figure_stands_a_loss_that_is_not_finite(result, tmp_path):
    draw_result(json.loads(result.read_text()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["it's", "two words", "back\\slash", "a=b,c"])
def test_a_job_gets_its_folder_whatever_its_name(tmp_path, monkeypatch, name):
    folder, commands = tmp_path / name, []
    folder.mkdir()
    write_result(folder / "result.json", RESULT)

    def start(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", start)
    assert run_job(["seed=1"], folder, "train/accuracy") == 0.25
    (override,) = OverridesParser.create().parse_overrides([commands[0][-1]])
    assert (override.key_or_group, override.value()) == ("hydra.run.dir", str(folder))
