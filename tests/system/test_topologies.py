"""Every strategy gives the losses of `topology=online`, to the bit, in every other topology.

The default suite tries each strategy in one other topology, CI each topology once, the nightly tests all pairs.
"""

import functools
import itertools
import json

import pytest

from lightning_dataflow import available_strategies
from tests.processes import TINY, TRAIN, nightly, processes_in, python, result, slow, wait_until, with_strategy

STRATEGIES, TOPOLOGIES = available_strategies(), ("interleaved", "offline", "disagg_online", "disagg_offline")
DEFAULT = list(zip(STRATEGIES, itertools.cycle(TOPOLOGIES), strict=False))
CI = [(STRATEGIES[0], topology) for topology in TOPOLOGIES[len(DEFAULT) :]]
OTHERS = [pair for pair in itertools.product(STRATEGIES, TOPOLOGIES) if pair not in DEFAULT + CI]
SAME = ("losses", "samples_trained", "samples_skipped", "samples_recaptured", "global_batch_size", "optimizer_steps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("topologies")


@pytest.fixture(scope="module")
def trained(folder):
    """trained(strategy, topology, *settings) → the result of 12 steps. The last four draw new anchors in a second pass."""

    @functools.cache
    def run(strategy: str, topology: str, *settings: str) -> dict:
        name = "-".join((strategy, topology, *(["ranks"] if settings else [])))
        common = ("trainer.max_steps=12", f"topology={topology}", f"run_name={name}")
        room = ("store.capacity_bytes=64000000",) if topology.startswith("disagg") else ()
        python(TRAIN, *with_strategy(TINY, strategy), *common, *room, *settings, cwd=folder)
        wait_until(lambda: not processes_in(folder), 10, lambda: f"processes left: {processes_in(folder)}")
        return result(folder, name)

    return run


@pytest.mark.parametrize(
    ("strategy", "topology"), [*DEFAULT, *(slow(*pair) for pair in CI), *(nightly(*pair) for pair in OTHERS)]
)
def test_losses_are_those_of_online_to_the_bit(trained, strategy, topology):
    here, online = trained(strategy, topology), trained(strategy, "online")
    assert {key: here[key] for key in SAME} == {key: online[key] for key in SAME}
    assert len(here["losses"]) == 12


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_of_a_streamed_run_give_the_same_losses(trained, strategy):
    two = trained(strategy, "disagg_online", "trainer=ddp", "trainer.devices=2")
    assert two["losses"] == pytest.approx(trained(strategy, "online")["losses"], rel=1e-4)


def test_the_status_command_after_a_run(folder, trained):
    trained("eagle3", "online"), trained("eagle3", "disagg_online")
    command = ("-m", "lightning_dataflow", "status")
    report = json.loads(python(*command, "runs/eagle3-disagg_online", "--json", "--interval=0.1", cwd=folder).stdout)
    assert report["finished"] == "completed"
    assert (report["published"], report["trained_seq"], report["durable_seq"]) == (96, 96, 96)
    assert report["refs_in_flight"] == report["bytes_in_flight"] == report["leased"] == 0
    assert {part["name"].partition("-")[0] for part in report["parts"]} == {"producer", "supervisor", "trainer"}
    assert "trained     up to seq 96, step 12" in python(*command, "runs/eagle3-disagg_online", cwd=folder).stdout
    wrong = python(*command, "runs/eagle3-online", cwd=folder, status=1).stderr
    assert wrong.startswith("error: runs/eagle3-online has ended and left nothing to watch: its result is in")
