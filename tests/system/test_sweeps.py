"""Hydra multirun: every job has its own process and values, on every rank."""

import json

import pytest

from tests.processes import TINY, TRAIN, python, result, with_strategy

SHORT = (*TINY, "trainer.max_steps=2")


def results(folder):
    (sweep,) = (folder / "runs").glob("sweep-*")
    actual = sorted(sweep.glob("*/result.json"), key=lambda path: int(path.parent.name))
    return sweep, [json.loads(path.read_text()) for path in actual]


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


@pytest.mark.nightly
def test_a_grid_of_strategies_on_two_ranks(tmp_path):
    """Each job has the sizes that the experiment sets for its strategy, and the losses of a run of its own on one rank."""
    strategies = ("eagle3", "dflash", "domino")
    choice, ranks = ",".join(strategies), ("trainer=ddp", "trainer.devices=2")
    steps = (*TINY, "trainer.max_steps=3")  # in the third, domino's head has learned: before, its losses are dflash's
    shown = python(TRAIN, "-m", *with_strategy(steps, choice), *ranks, cwd=tmp_path).stdout
    jobs = results(tmp_path)[1]
    assert [job["settings"]["strategy"]["name"] for job in jobs] == list(strategies)
    assert [job["world_size"] for job in jobs] == [2, 2, 2]
    sizes = [{"draft_vocab_size": 96, "num_steps": 4}, {"num_anchors": 16}, {"num_anchors": 16, "gru_hidden_dim": 32}]
    for job, strategy, size in zip(jobs, strategies, sizes, strict=True):
        assert size.items() <= job["settings"]["strategy"].items()
        python(TRAIN, *with_strategy(steps, strategy), f"run_name={strategy}", cwd=tmp_path)
        assert job["losses"] == pytest.approx(result(tmp_path, strategy)["losses"], rel=1e-4)
        row = next(line for line in shown.splitlines() if f"strategy={strategy}" in line and "completed" in line)
        assert f"{job['losses'][-1]:.4f}" in row
    assert len({round(job["losses"][-1], 3) for job in jobs}) == 3


@pytest.mark.slow
def test_optuna(tmp_path):
    search = ("sweep=optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=interval(1e-4,1e-2)")
    python(TRAIN, "-m", *SHORT, *search, "trainer=ddp", "trainer.devices=2", cwd=tmp_path)
    sweep, jobs = results(tmp_path)
    assert len({job["settings"]["optimizer"]["lr"] for job in jobs}) == 4
    best = min(job["losses"][-1] for job in jobs)
    assert f"best_value: {best}"[:18] in (sweep / "optimization_results.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("sweep=joblib",), ("sweep=slurm", "hydra/launcher=submitit_local")])
def test_launchers(tmp_path, launcher):
    """Jobs side by side, or by submitit, here with its executor for one machine, in an environment as SLURM makes it."""
    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    (tmp_path / "mine" / "optimizer" / "fast.yaml").write_text("defaults: [adamw]\nweight_decay: 0.25\n")
    cluster = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "sweep", "SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "1"}
    jobs = (*launcher, "optimizer=adamw,fast", "trainer=ddp", "trainer.devices=2")
    shown = python(
        *(TRAIN, "--config-dir=mine", "-m", *SHORT, *jobs),
        cwd=tmp_path,
        variables=cluster if "sweep=slurm" in launcher else None,
    ).stdout
    sweep, actual = results(tmp_path)
    assert [job["settings"]["optimizer"]["weight_decay"] for job in actual] == [0.0, 0.25]
    assert [job["world_size"] for job in actual] == [2, 2]
    assert f"results in {sweep.relative_to(tmp_path)}" in shown


@pytest.mark.nightly
def test_a_job_that_fails_is_named(tmp_path):
    shown = python(TRAIN, "-m", *SHORT, "data.global_batch_size=8,7", cwd=tmp_path, status=1)
    assert "ended with status 1, see its messages above" in shown.stderr
    wrong = python(TRAIN, "-m", *SHORT, "sweep_metric=beauty", "seed=1,2", cwd=tmp_path, status=1)
    assert "sweep_metric=beauty is not in the results: available are" in wrong.stderr
