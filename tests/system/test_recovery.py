"""Processes of a run are killed while it trains; the result equals that of an undisturbed run."""

import json
import os
import re
import signal

import pytest

from tests.processes import TINY, TRAIN, nightly, processes_in, python, result, wait_until
from tests.system.test_disaggregated import DISAGG, find, started, status

LONG = (*DISAGG, "trainer.max_steps=40", "callbacks.checkpoint.every_n_train_steps=10")
WORKS = ("losses", "samples_trained", "samples_skipped", "optimizer_steps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder where one process has trained 40 steps in topology=online."""
    folder = tmp_path_factory.mktemp("recovery")
    python(TRAIN, *LONG, *TINY, "topology=online", "store=memory", "control=noop", "run_name=straight", cwd=folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(folder):
    yield
    wait_until(lambda: not processes_in(folder), 10, lambda: f"processes left: {processes_in(folder)}")


def is_at_step(folder, name: str, step: int) -> bool:
    try:
        return status(folder, name)["trained_step"] >= step
    except AssertionError:  # no ledger yet
        return False


def agrees(folder, name: str) -> dict:
    """The result of a disturbed run, after checking that it equals that of the undisturbed one."""
    actual, straight = result(folder, name), result(folder, "straight")
    assert {key: actual[key] for key in WORKS} == {key: straight[key] for key in WORKS}
    after = status(folder, name)
    assert after["finished"] == "completed"
    assert after["refs_in_flight"] == after["bytes_in_flight"] == after["leased"] == 0
    return actual


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [nightly("role=producer"), "role=trainer", nightly("/mooncake_master"), nightly("mooncake_client")]
)
def test_a_part_that_is_killed_starts_again(folder, part):
    name = f"killed-{len(part)}"
    with started(folder, *LONG, "topology.restarts=2", f"run_name={name}") as process:
        wait_until(lambda: is_at_step(folder, name, 15), 60, process.shown)
        os.kill(find(folder, part), signal.SIGKILL)
        before = status(folder, name)
        print(before)
        assert process.wait(timeout=120) == 0, process.shown()
    print(process.shown())
    assert re.search(r"starts again in [18] s, restart 1 of 2", process.shown())
    actual = agrees(folder, name)
    print(json.dumps({key: actual[key] for key in ("restarts", "samples_recaptured")}))
    assert list(actual["restarts"].values()) == [1]
    assert re.search(r"\S+: was killed by SIGKILL|ended with status -9", process.shown())


@pytest.mark.nightly
def test_a_run_goes_on_while_a_producer_lives(folder):
    """Without restarts: the other producer takes over the leases at once, not after lease_s."""
    with started(folder, *LONG, "topology.num_producers=2", "run_name=one-of-two") as process:
        wait_until(lambda: is_at_step(folder, "one-of-two", 5), 60, process.shown)
        os.kill(find(folder, "one-of-two/producer-0"), signal.SIGKILL)
        assert process.wait(timeout=120) == 0, process.shown()
    assert re.search(r"producer-0: was killed by SIGKILL .*; the run goes on with producer-1", process.shown())
    assert agrees(folder, "one-of-two")["restarts"] == {}


@pytest.mark.slow
def test_features_are_kept_until_a_checkpoint(folder):
    """A store that holds few windows has checkpoints written early, by all ranks at once; a resume captures nothing."""
    few = ("topology.release_at=durable", "topology.high_bytes=6000000", "callbacks.checkpoint.every_n_train_steps=1000")
    ranks = ("trainer=ddp", "trainer.devices=2")
    with started(folder, *LONG[:-1], *few, *ranks, "topology.restarts=1", "run_name=kept") as process:
        wait_until(lambda: is_at_step(folder, "kept", 12), 90, process.shown)
        during = status(folder, "kept")
        os.kill(find(folder, "role=trainer"), signal.SIGKILL)
        assert process.wait(timeout=120) == 0, process.shown()
    assert 0 < during["durable_step"] <= during["trained_step"]
    actual = result(folder, "kept")
    assert actual["losses"] == pytest.approx(result(folder, "straight")["losses"], rel=1e-4)
    assert actual["early_checkpoints"] > 5
    assert actual["restarts"] == {"trainer": 1}
    assert actual["samples_recaptured"] == actual["samples_skipped"] == 0
    assert status(folder, "kept")["refs_in_flight"] == 0


@pytest.mark.slow
def test_bad_settings_are_not_tried_again(folder):
    shown = python(TRAIN, *LONG, "topology.restarts=5", "target.path=nowhere", "run_name=bad", cwd=folder, status=1)
    assert "starts again" not in shown.stdout
    assert re.search(r"^error: (producer-0|trainer): no target model in nowhere ", shown.stderr)  # whichever is first
    refused = python(TRAIN, *LONG, "topology.restarts=-1", "run_name=bad", cwd=folder, status=1)
    assert "error: topology.restarts=-1 is out of bounds: it must be at least 0" in refused.stderr
    alone = ("~callbacks.checkpoint", "+trainer.enable_checkpointing=false", "topology.release_at=durable")
    refused = python(TRAIN, *LONG[:-1], *alone, "run_name=bad", cwd=folder, status=1)
    assert (
        "error: trainer: release_at=durable keeps features until a checkpoint, and this Trainer writes none"
        in refused.stderr
    )
