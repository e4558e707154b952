"""Each folder has one owner, for as long as that process lives."""

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from lightning_dataflow.cli.hydra_command import ClaimRun
from lightning_dataflow.config.schema import register_schemas
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.claim import LOCK, NO_LOCKS, claim
from tests.processes import environment

pytestmark = pytest.mark.integration  # processes that own folders

CLAIM = """
import subprocess, sys
from pathlib import Path
from lightning_dataflow.run.claim import claim
claim(Path(sys.argv[1]), "do something else")
{then}
"""
WAIT = "print('mine', flush=True); sys.stdin.read()"


def start_owner(folder, then: str = WAIT) -> subprocess.Popen[str]:
    """A process that claims `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM.format(then=then), str(folder)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def owner(tmp_path):
    """A living process that owns `tmp_path`."""
    process = start_owner(tmp_path)
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_owner_is_told_of_the_first(owner, tmp_path):
    since = json.loads((tmp_path / LOCK).read_text())["since"]
    with pytest.raises(UserError) as refused:
        claim(tmp_path, "do something else")
    whose = f"process {owner.pid} on {socket.gethostname()} since {since}"
    assert str(refused.value) == f"{tmp_path} is in use by {whose}: do something else"


def test_a_killed_owner_leaves_the_folder_to_the_next(owner, tmp_path):
    owner.send_signal(signal.SIGKILL)
    claim(tmp_path, "do something else")
    claim(tmp_path, "do something else")  # its own
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with pytest.raises(BlockingIOError):
        fcntl.flock(os.open(tmp_path / LOCK, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.integration
def test_a_child_works_under_its_parents_claim(tmp_path):
    """A grandchild does not: nothing of ours starts a part by way of another process."""
    claim(tmp_path, "do something else")
    child = start_owner(tmp_path, "print('mine')")
    assert child.communicate(timeout=60)[0] == "mine\n"
    stranger = f"print(subprocess.run([sys.executable, '-c', {CLAIM.format(then='')!r}, {str(tmp_path)!r}]).returncode)"
    grandchild = start_owner(tmp_path, stranger)
    shown, errors = grandchild.communicate(timeout=60)
    assert shown == "1\n"
    assert f"is in use by process {os.getpid()} on" in errors


@pytest.mark.parametrize("how", ["subprocess.Popen", "os.fork"])
def test_what_outlives_the_owner_does_not_keep_its_claim(tmp_path, how):
    """As a server that is left over would."""
    sleep = {
        "subprocess.Popen": "print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid, flush=True)",
        "os.fork": "import os, time\nif (pid := os.fork()) == 0:\n    time.sleep(60)\nprint(pid, flush=True)",
    }[how]
    owner = start_owner(tmp_path, f"{sleep}\n{WAIT}")
    left_over = int(owner.stdout.readline())
    try:
        owner.kill()
        claim(tmp_path, "do something else")
        os.kill(left_over, 0)  # it is there
    finally:
        os.kill(left_over, signal.SIGKILL)
        owner.communicate()


@pytest.mark.integration
def test_of_many_at_once_one_is_the_owner(tmp_path):
    def try_it(results) -> None:
        try:
            claim(tmp_path, "do something else")
            results.put("mine")
        except UserError as error:
            results.put(str(error))
        time.sleep(10)

    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    processes = [fork.Process(target=try_it, args=(results,)) for _ in range(8)]
    for process in processes:
        process.start()
    found = sorted(results.get() for _ in processes)
    for process in processes:
        process.kill()
        process.join()
    assert found.count("mine") == 1
    assert [one for one in found if one != "mine" and "is in use by process" not in one] == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*/file/run: Not a directory; choose another folder"):
        claim(tmp_path / "file" / "run", "do something else")


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog, number):
    def refuse(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    claim(tmp_path, "do something else")
    assert f"{tmp_path} cannot be locked ({os.strerror(number)}): do not start" in caplog.text


@pytest.fixture
def composed():
    """The configuration of a training run, as Hydra has it before the run starts."""

    def compose_with(*overrides: str):
        register_schemas()
        GlobalHydra.instance().clear()
        with initialize_config_module("lightning_dataflow.conf", version_base="1.3"):
            return compose("train", overrides, return_hydra_config=True)

    return compose_with


def test_the_folder_of_results_is_claimed_too(owner, composed, tmp_path, tmp_path_factory, monkeypatch, capsys):
    """`run_dir` may be another folder than Hydra's."""
    config = composed(f"hydra.run.dir={tmp_path_factory.mktemp('hydra')}", f"run_dir={tmp_path}")
    monkeypatch.setattr(ClaimRun, "wanted", True)
    with pytest.raises(SystemExit):
        ClaimRun().on_run_start(config)
    assert f"error: {tmp_path} is in use by process {owner.pid}" in capsys.readouterr().err


def test_ranks_leave_the_claim_to_the_first(owner, composed, tmp_path, monkeypatch):
    """Lightning's own launch on two nodes has a first process on each."""
    config = composed(f"hydra.run.dir={tmp_path}")
    monkeypatch.setattr(ClaimRun, "wanted", True)
    for name in ("RANK", "NODE_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            ClaimRun().on_run_start(config)
        assert config.hydra.output_subdir is None
    with pytest.raises(SystemExit):
        ClaimRun().on_run_start(config)
