"""Faults at chosen moments; the result is that of an undisturbed run. `python -m tests.system.chaos` runs random trials."""

import random
import shutil

import pytest

from tests.processes import nightly
from tests.system.chaos.schedules import random_schedule
from tests.system.chaos.trial import compare, run_trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FSDP2 = ("trainer=fsdp2", "trainer.devices=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    outcome = run_trial(tmp_path_factory.mktemp("undisturbed"), [])
    assert (outcome.wrong, outcome.starts, outcome.errors) == ([], 1, [])
    return outcome


@pytest.mark.parametrize("seed", [0, *(nightly(seed) for seed in (1, 2, 3, 4))])
def test_random_faults(tmp_path, undisturbed, seed):
    schedule = random_schedule(random.Random(seed))
    outcome = run_trial(tmp_path, schedule.faults, schedule.settings, own_services=schedule.own_services)
    assert compare(outcome, undisturbed) == [], (schedule, outcome.errors)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
@pytest.mark.parametrize("seed", [300, nightly(304)])
def test_random_faults_over_redis(tmp_path, undisturbed, seed):
    schedule = random_schedule(random.Random(seed), redis=True)
    outcome = run_trial(tmp_path, schedule.faults, schedule.settings, own_services=schedule.own_services)
    assert compare(outcome, undisturbed) == [], (schedule, outcome.errors)


def test_the_comparison_notices_a_difference(undisturbed):
    """The comparison of a trial reports a difference."""
    assert compare(undisturbed, undisturbed) == []
    for change in (
        {"losses": [*undisturbed.losses[:-1], 0.0]},
        {"losses": undisturbed.losses[:-1]},
        {"samples": {**undisturbed.samples, 3: undisturbed.samples[4]}},
        {"weights": {name: weight + 1e-7 for name, weight in undisturbed.weights.items()}},
        {"wrong": ["left in the store: x"]},
    ):
        other = type(undisturbed)(**{**vars(undisturbed), **change})
        assert len(compare(other, undisturbed)) == 1


@pytest.mark.parametrize("moment", [nightly("before append"), nightly("before checkpoint")])
def test_a_full_disk(tmp_path, undisturbed, moment):
    part = "trainer" if "checkpoint" in moment else "producer-0"
    outcome = run_trial(tmp_path, [{"part": part, "moment": moment, "count": 2, "action": "disk full"}])
    assert compare(outcome, undisturbed) == []
    assert all("No space left on device" in error for error in outcome.errors)


@pytest.mark.nightly
def test_a_full_store(tmp_path, undisturbed):
    """Before the first put: nothing is in flight that the trainer could free."""
    fault = {"part": "producer-0", "moment": "before put", "count": 1, "action": "store full"}
    settings = ("store.capacity_bytes=32000000", "topology.idle_timeout_s=8", "topology.high_refs=16")
    outcome = run_trial(tmp_path, [fault], settings)
    assert compare(outcome, undisturbed) == []
    (error,) = outcome.errors
    assert "no sample came for" in error


@pytest.mark.nightly
def test_a_killed_rank_of_two(tmp_path, undisturbed):
    whole = run_trial(tmp_path / "whole", [], FSDP2)
    assert compare(whole, whole) == []
    assert whole.losses == pytest.approx(undisturbed.losses, rel=1e-4)
    faults = [{"part": "trainer", "moment": "after optimizer step", "count": 5, "action": "kill"}]
    outcome = run_trial(tmp_path / "killed", faults, FSDP2)
    assert outcome.starts == 2
    assert compare(outcome, whole, tolerance=1e-5) == []
