"""kill -9 while a checkpoint is written, and checkpoints that were damaged afterwards."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from lightning_dataflow.checkpoints.markers import mark_complete
from tests.processes import ROOT, TINY, TRAIN, environment, nightly, python, result, torchrun

pytestmark = pytest.mark.slow

KILLED = str(ROOT / "tests" / "system" / "kill_in_save.py")
EVERY_2 = "callbacks.checkpoint.every_n_train_steps=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder where one process has trained 8 steps, undisturbed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    python(TRAIN, *TINY, EVERY_2, "run_name=straight", cwd=folder)
    return folder


def complete(folder, run_name):
    return sorted(path.name[5:11] for path in (folder / "runs" / run_name / "checkpoints").glob("*.complete"))


def test_killed_while_a_checkpoint_is_written(folder):
    """The third checkpoint of a run is never finished; the resume starts from the second, to the bit."""
    settings = (*TINY, EVERY_2, "run_name=killed")
    python(KILLED, "3", "0", *settings, cwd=folder, status=-9)
    assert complete(folder, "killed") == ["000002", "000004"]
    python(KILLED, "1", "0", *settings, "ckpt_path=auto", cwd=folder, status=-9)
    python(TRAIN, *settings, "ckpt_path=last", cwd=folder)
    assert complete(folder, "killed") == ["000004", "000006", "000008"]  # Lightning keeps what it resumed from
    killed, straight = result(folder, "killed"), result(folder, "straight")
    for name in ("losses", "samples_trained", "samples_skipped", "samples_recaptured", "optimizer_steps"):
        assert killed[name] == straight[name]
    assert not list((folder / "runs" / "killed" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("rank", ["0", nightly("1")])
def test_a_rank_killed_while_it_writes_its_shard(folder, rank):
    name = f"rank-{rank}"
    settings = (*TINY, EVERY_2, "trainer=fsdp2", "trainer.devices=2", f"run_name={name}")
    torchrun(KILLED, "3", rank, *settings, cwd=folder, status=1)
    half = folder / "runs" / name / "checkpoints" / "step-000006.ckpt"
    assert half.is_dir()
    shown = torchrun(TRAIN, *settings, "ckpt_path=last", cwd=folder).stdout
    lines = [line for line in shown.splitlines() if "is skipped" in line]
    assert len(lines) == 1
    assert "step-000006.ckpt is skipped, it is not a complete checkpoint: it has no completion marker" in lines[0]
    assert lines[0].endswith("resuming from step-000004.ckpt")
    assert result(folder, name)["losses"] == pytest.approx(result(folder, "straight")["losses"], rel=1e-5)
    assert complete(folder, name) == ["000004", "000006", "000008"]


def test_damaged_checkpoints(folder):
    """A file cut short is skipped by `last`, and one line when it is asked for by its path; none at all is a new run."""
    settings = (*TINY, EVERY_2, "run_name=damaged", "trainer.max_steps=4")
    shown = python(TRAIN, *settings, "ckpt_path=auto", cwd=folder).stdout
    assert "skipped" not in shown
    losses = result(folder, "damaged")["losses"]
    newest = folder / "runs" / "damaged" / "checkpoints" / "step-000004.ckpt"
    os.truncate(newest, 10_000)
    command = [sys.executable, TRAIN, *settings, f"ckpt_path='{newest}'"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {newest} is not a complete checkpoint: step-000004.ckpt has 10000 bytes")
    assert len(done.stderr.splitlines()) == 1
    shown = python(TRAIN, *settings, "ckpt_path=last", cwd=folder).stdout
    assert "resuming from step-000002.ckpt" in shown
    assert result(folder, "damaged")["losses"] == losses


def test_a_crafted_checkpoint_removes_nothing_outside_of_its_run(folder):
    """Its list of the best checkpoints names folders beside the run, which Lightning would remove one after the other."""
    run = folder / "runs" / "crafted"
    shutil.copytree(folder / "runs" / "straight", run)
    (run / "result.json").unlink()
    path = run / "checkpoints" / "step-000008.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["DataFlowDataModule"]["run_id"] = "crafted"
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    victims = ["local://scratch/victim", f"{run}/checkpoints/../../../scratch/other"]
    for name in ("victim", "other"):
        (folder / "scratch" / name).mkdir(parents=True)
        (folder / "scratch" / name / "notes").write_text("keep")
    state |= {"dirpath": str(run / "checkpoints"), "kth_best_model_path": victims[0], "best_model_path": victims[1]}
    state["best_k_models"] = {name: torch.tensor(float(step)) for step, name in enumerate(victims)}
    state["kth_value"] = torch.tensor(0.0)
    torch.save(checkpoint, path)
    mark_complete(path, 8)
    shown = python(TRAIN, *TINY, EVERY_2, "run_name=crafted", "ckpt_path=last", "trainer.max_steps=14", cwd=folder)
    assert [name.parent.name for name in sorted((folder / "scratch").glob("*/notes"))] == ["other", "victim"]
    (line,) = (line for line in shown.stderr.splitlines() if "the list is left out" in line)
    assert repr(victims[0]) in line
    assert complete(folder, "crafted") == ["000006", "000008", "000012", "000014"]
