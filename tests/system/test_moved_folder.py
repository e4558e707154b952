"""A run whose folder is moved away, or whose file system refuses writes: one line, and nothing is made elsewhere."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.processes import TINY, TRAIN, environment, nightly, processes_in, slow, wait_until

STEPS = "trainer.max_steps=2000"
OFTEN = "callbacks.checkpoint.every_n_train_steps=2"
SMALL = "store.capacity_bytes=64000000"
TOPOLOGIES = [
    ("topology=online",),
    slow(("topology=disagg_online", SMALL, "topology.restarts=2")),
    nightly(("topology=disagg_online", SMALL, "channel=redis", "control=redis")),
]


def start(folder, *arguments: str, launcher: tuple[str, ...] = ()) -> tuple[subprocess.Popen[str], str]:
    """A run that has reached its third step, and the file that it prints to."""
    output = folder.parent / f"{folder.name}.txt"
    command = [*launcher, sys.executable, TRAIN, *TINY, STEPS, OFTEN, "run_name=moved", *arguments]
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: "step 3/" in output.read_text() or process.poll() is not None, 120, output.read_text)
    assert process.poll() is None, output.read_text()
    return process, output


def check_end(process, output, folder, message: str) -> None:
    """It ended with one line, and left no process."""
    status, text = process.wait(timeout=180), output.read_text()
    assert status != 0
    assert "Traceback" not in text, text
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert message in error
    wait_until(lambda: not processes_in(folder), 10, lambda: f"processes left: {processes_in(folder)}")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_folder_that_is_moved_away_is_not_made_again(tmp_path, topology):
    process, output = start(tmp_path, *topology)
    (tmp_path / "runs" / "moved").rename(tmp_path / "elsewhere")
    check_end(process, output, tmp_path, f"{tmp_path}/runs/moved was moved or removed while a run used it: put it back")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="mounting needs root",
)
@pytest.mark.parametrize("topology", TOPOLOGIES[:2])
def test_a_file_system_that_becomes_read_only(tmp_path, topology):
    """In a mount namespace of its own, which ends with the run."""
    (tmp_path / "runs").mkdir()
    go = tmp_path / "go"
    script = (
        f"mount -t tmpfs none runs; (while [ ! -e {go} ]; do sleep 0.05; done; "
        'mount -o remount,ro runs || mount --bind -o ro runs runs) & exec "$@"'
    )
    process, output = start(tmp_path, *topology, launcher=("unshare", "-m", "bash", "-c", script, "bash"))
    go.touch()
    check_end(process, output, tmp_path, "Read-only file system")


def test_a_file_where_the_folder_of_the_runs_should_be(tmp_path):
    shutil.copy(TRAIN, tmp_path / "runs")
    command = [sys.executable, TRAIN, *TINY, "run_name=moved"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    (error,) = ended.stderr.splitlines()
    assert error == "error: cannot write to runs/moved: Not a directory; choose another folder"
