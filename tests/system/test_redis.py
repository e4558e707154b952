"""A run on one machine whose log and ledger are in a Redis that it starts itself."""

import os
import shutil
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from lightning_dataflow.services.redis import LocalRedis
from tests.processes import TINY, TRAIN, nightly, python, result, wait_until
from tests.system.test_disaggregated import DISAGG, folder as folder, nothing_is_left as nothing_is_left, started, status

pytestmark = [
    pytest.mark.skipif(
        shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
    ),
]

REDIS = (*DISAGG, "channel=redis", "control=redis")
LONG = (*REDIS, "trainer.max_steps=40", "callbacks.checkpoint.every_n_train_steps=10")


def redis_of(control: Path) -> list[int]:
    """Processes of the Redis with its files in `control`, which is their working directory."""
    processes = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == control:
                processes.append(int(entry.name))
        except OSError:
            continue
    return processes


def is_at_step(folder: Path, name: str, step: int) -> bool:
    try:
        return status(folder, name)["trained_step"] >= step
    except AssertionError:  # no ledger yet
        return False


def test_losses_are_those_of_online_to_the_bit_and_nothing_is_left(folder):
    python(TRAIN, *REDIS, "run_name=redis", cwd=folder)
    assert result(folder, "redis")["losses"] == result(folder, "online")["losses"]
    control = folder / "runs" / "redis" / "control"
    assert {path.name for path in control.iterdir()} == {"redis.log", "redis-lock"}
    assert not redis_of(control)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["redis", nightly("sqlite")])
def test_of_two_trainers_that_start_together_one_trains(folder, control, tmp_path):
    """Each has its own folder, as on two machines."""
    name = f"together-{control}"
    settings = (*TINY, "topology=disagg_online", f"run_name={name}", "store=shared_dir", f"store.root={tmp_path / 'store'}")
    with ExitStack() as stack:
        if control == "redis":
            server = stack.enter_context(LocalRedis(tmp_path / "redis"))
            where = (f"channel.address={server.where.address}", f"channel.secret_file={server.secret_file}")
            settings = (*settings, "channel=redis", "control=redis", *where)
        else:
            settings = (*settings, f"channel.path={tmp_path / 'control'}")
        parts = {}
        for part, role in (("producer", "producer"), ("one", "trainer"), ("other", "trainer")):
            (tmp_path / part).mkdir()
            parts[part] = stack.enter_context(started(tmp_path / part, *settings, f"role={role}"))
        for process in parts.values():
            process.wait(timeout=240)
    trainers = {part: parts[part] for part in ("one", "other")}
    shown = {part: process.shown() for part, process in parts.items()}
    assert sorted(process.returncode for process in trainers.values()) == [0, 1], shown
    won, lost = sorted(trainers, key=lambda part: trainers[part].returncode)
    (error,) = [line for line in shown[lost].splitlines() if line.startswith("error: ")]
    assert f"error: process {trainers[won].pid} on {socket.gethostname()} trains run {name}" in error
    assert "Traceback" not in shown[lost]
    assert (parts["producer"].returncode, "Traceback" in shown["producer"]) == (0, False), shown
    assert result(tmp_path / won, name)["losses"] == result(folder, "online")["losses"]


@pytest.mark.slow
def test_ctrl_c_and_an_exact_resume(folder):
    straight = (*LONG, "topology=online", "store=memory", "control=noop", "channel=file", "run_name=straight-redis")
    python(TRAIN, *straight, cwd=folder)
    control = folder / "runs" / "stopped-redis" / "control"
    with started(folder, *LONG, "run_name=stopped-redis") as process:
        wait_until(lambda: is_at_step(folder, "stopped-redis", 15), 120, process.shown)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert not redis_of(control)
    assert (control / "appendonlydir").is_dir()  # for the resume
    python(TRAIN, *LONG, "run_name=stopped-redis", "ckpt_path=last", cwd=folder)
    assert result(folder, "stopped-redis")["losses"] == result(folder, "straight-redis")["losses"]
    assert not (control / "appendonlydir").exists()


@pytest.mark.slow
def test_a_redis_that_is_killed_starts_again(folder):
    control = folder / "runs" / "killed-redis" / "control"
    with started(folder, *LONG, "topology.restarts=1", "run_name=killed-redis") as process:
        wait_until(lambda: is_at_step(folder, "killed-redis", 15), 120, process.shown)
        os.kill(redis_of(control)[0], signal.SIGKILL)
        assert process.wait(timeout=180) == 0, process.shown()
        assert "redis-server: ended with status -9; starts again in 1 s, restart 1 of 1" in process.shown()
        assert "redis-server runs again; its data was kept" in process.shown()
    actual = result(folder, "killed-redis")
    assert actual["losses"] == result(folder, "straight-redis")["losses"]
    assert (actual["restarts"], actual["samples_recaptured"]) == ({"redis-server": 1}, 0)


@pytest.mark.slow
def test_a_redis_that_dies_ends_the_run(folder):
    control = folder / "runs" / "dead-redis" / "control"
    with started(folder, *LONG, "run_name=dead-redis") as process:
        wait_until(lambda: is_at_step(folder, "dead-redis", 5), 120, process.shown)
        os.kill(redis_of(control)[0], signal.SIGKILL)
        assert process.wait(timeout=60) == 1, process.shown()
        assert f"error: redis-server ended with status -9, see {control / 'redis.log'}" in process.shown()
        assert "Traceback" not in process.shown()
