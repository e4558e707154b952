"""Parts of a run are killed while it trains, and what survives equals a run that nobody disturbed."""

import json
import os
import re
import signal

import pytest

from tests.processes import TINY, TRAIN, processes_in, python, result, wait_until
from tests.system.test_disaggregated import DISAGG, find, started, status

pytestmark = pytest.mark.system

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
    """The result of a disturbed run, which must be that of the undisturbed one."""
    found, straight = result(folder, name), result(folder, "straight")
    assert {key: found[key] for key in WORKS} == {key: straight[key] for key in WORKS}
    after = status(folder, name)
    assert after["finished"] == "completed"
    assert after["refs_in_flight"] == after["bytes_in_flight"] == after["leased"] == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["role=producer", "role=trainer", "bin/mooncake_master", "mooncake_client"])
def test_a_part_that_is_killed_starts_again(folder, part):
    name = f"killed-{len(part)}"
    with started(folder, *LONG, "topology.restarts=2", f"run_name={name}") as process:
        wait_until(lambda: is_at_step(folder, name, 15), 60, process.shown)
        os.kill(find(folder, part), signal.SIGKILL)
        before = status(folder, name)
        print(before)
        assert process.wait(timeout=120) == 0, process.shown()
    print(process.shown())
    assert re.search(r"starts again in [13] s, attempt 1 of 2", process.shown())
    found = agrees(folder, name)
    print(json.dumps({key: found[key] for key in ("restarts", "samples_recaptured")}))
    assert list(found["restarts"].values()) == [1]
    assert re.search(r"\[supervisor\] \S+: .*killed by SIGKILL|ended with status -9", process.shown())
