"""Hydra multirun: a process and values of its own for every job, on every rank."""

import json

import pytest

from tests.processes import TINY, TRAIN, python, result

pytestmark = pytest.mark.system
SHORT = (*TINY, "trainer.max_steps=2")


def results(folder):
    (sweep,) = (folder / "runs").glob("sweep-*")
    found = sorted(sweep.glob("*/result.json"), key=lambda path: int(path.parent.name))
    return sweep, [json.loads(path.read_text()) for path in found]


@pytest.mark.slow
def test_a_grid_on_two_ranks(tmp_path):
    """The second job's losses are those of a run of its own: both ranks had its values."""
    ranks = ("trainer=ddp", "trainer.devices=2")
    shown = python(TRAIN, "-m", *SHORT, *ranks, "optimizer.lr=1e-3,5e-2", cwd=tmp_path).stdout
    sweep, jobs = results(tmp_path)
    assert [job["settings"]["optimizer"]["lr"] for job in jobs] == [1e-3, 5e-2]
    python(TRAIN, *SHORT, "optimizer.lr=5e-2", "run_name=alone", cwd=tmp_path)
    alone = result(tmp_path, "alone")["losses"]
    assert jobs[1]["losses"] == pytest.approx(alone, rel=1e-4)
    assert jobs[0]["losses"][1] != pytest.approx(alone[1], rel=1e-4)
    header, first, second, last = shown.splitlines()[-4:]
    assert header.split() == ["job", "loss", "acceptance", "tokens/s", "status", "settings"]
    assert "optimizer.lr=0.001" in first
    assert f"{jobs[1]['losses'][-1]:.4f}" in second
    assert last == f"results in {sweep.relative_to(tmp_path)}"


@pytest.mark.slow
def test_optuna(tmp_path):
    search = ("sweep=optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=interval(1e-4,1e-2)")
    python(TRAIN, "-m", *SHORT, *search, "trainer=ddp", "trainer.devices=2", cwd=tmp_path)
    sweep, jobs = results(tmp_path)
    assert len({job["settings"]["optimizer"]["lr"] for job in jobs}) == 4
    best = min(job["losses"][-1] for job in jobs)
    assert f"best_value: {best}"[:18] in (sweep / "optimization_results.yaml").read_text()


@pytest.mark.slow
def test_a_job_that_fails_is_named(tmp_path):
    shown = python(TRAIN, "-m", *SHORT, "data.global_batch_size=8,7", cwd=tmp_path, status=1)
    assert "ended with status 1, see its messages above" in shown.stderr
    wrong = python(TRAIN, "-m", *SHORT, "sweep_metric=beauty", "seed=1,2", cwd=tmp_path, status=1)
    assert "sweep_metric=beauty is not in the results: available are" in wrong.stderr
