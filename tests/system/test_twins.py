"""Two commands that start together under one run_name: one trains, the other ends with one line and touches nothing."""

import json
import socket
import subprocess
import sys

import pytest

from tests.processes import TINY, TRAIN, environment, nightly, processes_in, result, slow, wait_until

SMALL = "store.capacity_bytes=64000000"
LRS = ("1e-3", "2e-3")


Shown = list[tuple[str, str]]


def run_both(folder, *arguments: str, launcher: tuple[str, ...] = ()) -> tuple[list[subprocess.Popen[str]], Shown]:
    """Two commands that differ in their learning rate, and what each printed: (stdout, stderr)."""
    commands = [[sys.executable, *launcher, TRAIN, *TINY, *arguments, f"optimizer.lr={lr}"] for lr in LRS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    twins = [subprocess.Popen(command, cwd=folder, env=environment(), **pipes) for command in commands]
    try:
        return twins, [process.communicate(timeout=240) for process in twins]
    finally:
        for process in twins:
            process.kill()


def check_winner(folder, lr: str) -> None:
    """The winner trained all of its samples, and wrote all files."""
    actual = result(folder, "twins")
    assert (actual["status"], actual["samples_trained"], len(actual["losses"])) == ("completed", 64, 8)
    assert actual["samples_skipped"] == actual["samples_recaptured"] == 0
    assert actual["settings"]["optimizer"]["lr"] == float(lr)
    assert f"optimizer.lr={lr}" in (folder / "runs" / "twins" / ".hydra" / "overrides.yaml").read_text()
    assert (folder / "runs" / "twins" / "checkpoints" / "step-000008.ckpt.complete").is_file()
    wait_until(lambda: not processes_in(folder), 10, lambda: f"processes left: {processes_in(folder)}")


@pytest.mark.parametrize(
    "topology",
    [
        ("topology=online",),
        nightly(("topology=interleaved",)),
        nightly(("topology=offline",)),
        slow(("topology=disagg_online", SMALL)),
        nightly(("topology=disagg_offline", SMALL)),
    ],
    ids=lambda settings: settings[0].partition("=")[2],
)
def test_one_of_two_trains(tmp_path, topology):
    twins, shown = run_both(tmp_path, *topology, "run_name=twins")
    assert sorted(process.returncode for process in twins) == [0, 1], shown
    won = next(index for index, process in enumerate(twins) if process.returncode == 0)
    stdout, stderr = shown[1 - won]
    (error,) = stderr.splitlines()
    whose = f"process {twins[won].pid} on {socket.gethostname()} since "
    assert error.startswith(f"error: runs/twins is in use by {whose}")
    assert error.endswith("choose another run_name; or end that process, or wait for it, and resume with ckpt_path=last")
    assert stdout == ""
    check_winner(tmp_path, LRS[won])


@pytest.mark.nightly
def test_one_of_two_trains_on_two_ranks(tmp_path):
    """Rank 1 of the other must not write either, before its rank 0 has ended."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    twins, shown = run_both(tmp_path, "run_name=twins", "trainer=ddp", "trainer.devices=2", launcher=launcher)
    assert sorted(process.returncode for process in twins) == [0, 1], shown
    won = next(index for index, process in enumerate(twins) if process.returncode == 0)
    (error,) = [line for line in shown[1 - won][1].splitlines() if line.startswith("error: ")]
    owner = json.loads((tmp_path / "runs" / "twins" / "owner.lock").read_text())
    assert error.startswith(f"error: runs/twins is in use by process {owner['pid']} on {owner['host']} since ")
    check_winner(tmp_path, LRS[won])
