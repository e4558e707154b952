"""Whole commands in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import (
    ROOT,
    TINY,
    TRAIN,
    environment,
    nightly,
    python,
    restore_sigint,
    result,
    wait_until,
    with_strategy,
)


def running(group: int) -> list[str]:
    """Processes of a process group that have not ended."""
    listing = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    return [arguments for pgid, state, arguments in rows if int(pgid) == group and not state.startswith("Z")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder where the README's first training command has run."""
    folder = tmp_path_factory.mktemp("commands")
    start = time.monotonic()
    python(TRAIN, "strategy=eagle3", "topology=online", "experiment=tiny", "run_name=online", cwd=folder)
    assert time.monotonic() - start < 60
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batches_do_not_change_the_losses(folder, micro_batch_size):
    name = f"micro-{micro_batch_size}"
    python(TRAIN, *TINY, f"data.micro_batch_size={micro_batch_size}", f"run_name={name}", cwd=folder)
    assert result(folder, name)["losses"] == pytest.approx(result(folder, "online")["losses"], rel=1e-5)


@pytest.mark.slow
def test_the_plain_script_trains_the_same_draft(folder):
    """At most 25 lines, no Hydra; the losses are those of train.py with the same settings."""
    script = ROOT / "recipes" / "plain_lightning" / "train.py"
    assert len(script.read_text().splitlines()) <= 25
    target, prompts = (str(folder / "assets" / "tiny" / name) for name in ("target", "conversations.jsonl"))
    python(str(script), target, prompts, "4", cwd=folder)
    plain = json.loads(next((folder / "lightning_logs").rglob("result.json")).read_text())
    settings = ("strategy.draft_vocab_size=256", "optimizer.lr=1e-3", "data.num_eval_samples=0", "trainer.max_steps=4")
    python(TRAIN, *TINY, *settings, "run_name=same", cwd=folder)
    assert plain["losses"] == result(folder, "same")["losses"]


@pytest.mark.slow
def test_lightning_cli(folder):
    python("-m", "lightning_dataflow", "capture", *TINY, "store=shared_dir", "store.root=features/tiny", cwd=folder)
    recipe = ROOT / "recipes" / "lightning_cli"
    python(str(recipe / "train.py"), "fit", "--config", str(recipe / "config.yaml"), cwd=folder)
    results = [json.loads(path.read_text()) for path in (folder / "lightning_logs").rglob("result.json")]
    assert result(folder, "online")["losses"] in [one["losses"] for one in results]
    wrong = ("fit", "--config", str(recipe / "config.yaml"), "--model.num_stepz", "3")
    assert "num_stepz" in python(str(recipe / "train.py"), *wrong, cwd=folder, status=2).stderr


@pytest.mark.slow
def test_ctrl_c_ends_everything_and_a_resume_goes_on(folder):
    """Two ranks are interrupted in the middle; no process stays, and the resumed run equals one never interrupted."""
    settings = ("trainer=ddp", "trainer.devices=2", "trainer.max_steps=40", "callbacks.checkpoint.every_n_train_steps=2")
    python(TRAIN, *TINY, *settings, "run_name=straight", cwd=folder)
    command = [sys.executable, TRAIN, *TINY, *settings, "run_name=stopped"]
    options = {"start_new_session": True, "preexec_fn": restore_sigint, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env=environment(), **options)
    checkpoints = folder / "runs" / "stopped" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-00000[4-9].ckpt")):
        assert time.monotonic() < deadline, "no checkpoint within 120 s"
        assert process.poll() is None, "training ended before it could be interrupted"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) != 0
    deadline = time.monotonic() + 10
    while running(process.pid):
        assert time.monotonic() < deadline, f"still there after 10 s: {running(process.pid)}"
        time.sleep(0.1)
    python(TRAIN, *TINY, *settings, "run_name=stopped", "ckpt_path=last", cwd=folder)
    resumed, straight = result(folder, "stopped"), result(folder, "straight")
    assert resumed["losses"] == pytest.approx(straight["losses"], rel=1e-6)
    assert resumed["samples_trained"] == straight["samples_trained"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["eagle3", nightly("dflash"), nightly("domino")])
def test_a_killed_run_resumes_to_the_bit(folder, strategy):
    """Killed in its second pass: the resumed losses, and so the anchors, are those of a run that was left alone."""
    straight, killed = f"straight-{strategy}", f"killed-{strategy}"
    settings = (*with_strategy(TINY, strategy), "trainer.max_steps=20", "callbacks.checkpoint.every_n_train_steps=2")
    python(TRAIN, *settings, f"run_name={straight}", cwd=folder)
    command = [sys.executable, TRAIN, *settings, f"run_name={killed}"]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.DEVNULL)
    checkpoints = folder / "runs" / killed / "checkpoints"
    try:
        wait_until(lambda: list(checkpoints.glob("step-00001[2-8].ckpt")), 120, lambda: f"status {process.poll()}")
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "runs" / killed / "result.json").exists()
    python(TRAIN, *settings, f"run_name={killed}", "ckpt_path=last", cwd=folder)
    resumed, undisturbed = result(folder, killed), result(folder, straight)
    assert len(resumed["losses"]) == 20
    assert resumed["losses"] == undisturbed["losses"]
    assert resumed["samples_trained"] == undisturbed["samples_trained"]


def test_ctrl_c_while_a_command_exits_shows_no_traceback(folder):
    """A part that failed is interrupted by its supervisor, however far it has come."""
    command = [sys.executable, "-m", "tests.system.slow_exit", *TINY, "data.max_length=4", "run_name=exits"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": restore_sigint}
    with subprocess.Popen(command, cwd=folder, env=environment(), **options) as process:
        assert any(line == "exiting\n" for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert "no prompts left" in errors
    assert "Traceback" not in errors


def test_bad_input_is_one_line_for_users_of_the_command(folder):
    shown = python(TRAIN, *TINY, "data.max_length=4", cwd=folder, status=1).stderr
    errors = [line for line in shown.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("error: no prompts left to train on")
    assert "Traceback" not in shown
