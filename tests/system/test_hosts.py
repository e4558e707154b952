"""Producer, trainer and store on hosts of their own, with no folder in common."""

import os
import random
import subprocess
import time

import pytest

from tests.processes import TINY, TRAIN, nightly, python, result, wait_until
from tests.system.chaos.links import random_cuts, run_trial
from tests.system.hosts import SECRET, Host, hosts, redis, start_services, steps, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

NUM_STEPS = 24
TWO_HERE = ("--standalone", "--nproc_per_node=2")
LONG = (*TINY, f"trainer.max_steps={NUM_STEPS}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where one process has trained in topology=online."""
    folder = tmp_path_factory.mktemp("hosts")
    python(TRAIN, *LONG, "topology=online", "run_name=online", cwd=folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No namespace and no link of this process."""
    yield
    listed = [subprocess.run(["ip", *what], capture_output=True, text=True).stdout for what in (("netns",), ("-o", "link"))]
    assert f"ldf{os.getpid()}-" not in "".join(listed)


@pytest.fixture
def three(tmp_path):
    """(producers, trainer, services), and the settings of parts."""
    with hosts(tmp_path, ("producer", "trainer", "services")) as (producer, trainer, services):
        for host in (producer, trainer):
            (host.folder / "secret").write_text(SECRET)
        settings = start_services(services)
        time.sleep(2)
        yield producer, trainer, services, (*LONG, "topology=disagg_online", *settings, "topology.idle_timeout_s=120")


def ends_well(process: subprocess.Popen[bytes], host: Host, timeout_s: float = 240) -> None:
    wait_until(lambda: process.poll() is not None, timeout_s, host.shown)
    assert process.returncode == 0, host.shown()
    assert SECRET not in host.shown()


def keys(services: Host) -> str:
    """What is left in the Redis."""
    return redis(services, "DBSIZE")


def cut_for(host: Host, services: Host, name: str, seconds: float) -> tuple[int, int]:
    """Cut a host off while training runs; returns the steps told at the cut and when it was healed."""
    host.cut()
    before = steps(services, name)
    time.sleep(seconds)
    after = steps(services, name)
    host.heal()
    return before, after


def test_one_rank_has_the_losses_of_one_process(folder, three):
    producer, trainer, services, settings = three
    producing = producer.train(*settings, "run_name=one", "role=producer")
    ends_well(trainer.train(*settings, "run_name=one", "role=trainer"), trainer)
    ends_well(producing, producer)
    assert result(trainer.folder, "one")["losses"] == result(folder, "online")["losses"]
    assert keys(services) == "0"


@pytest.mark.nightly
def test_two_ranks(folder, three):
    producer, trainer, services, settings = three
    settings = (*settings, "run_name=two")
    producing = [producer.train(*settings, "role=producer") for _ in range(2)]
    ends_well(trainer.train(*settings, "role=trainer", "trainer=ddp", "trainer.devices=2", torchrun=TWO_HERE), trainer)
    for one in producing:
        ends_well(one, producer)
    assert result(trainer.folder, "two")["losses"] == pytest.approx(result(folder, "online")["losses"], rel=1e-4)
    assert keys(services) == "0"


@pytest.mark.nightly
def test_two_ranks_on_two_hosts(folder, three):
    first, second, services, settings = three  # the producer is where the store is
    (services.folder / "secret").write_text(SECRET)
    settings = (*settings, "run_name=nodes")
    producing = services.train(*settings, "role=producer")
    nodes = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={first.address}:29400")
    settings = (*settings, "role=trainer", "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2")
    training = [
        host.train(
            *settings, torchrun=(*nodes, f"--local-addr={host.address}", f"--rdzv-conf=is_host={int(host is first)}")
        )
        for host in (first, second)
    ]
    for one, host in zip(training, (first, second), strict=True):
        ends_well(one, host)
    ends_well(producing, services)
    actual = result(first.folder, "nodes")
    assert actual["losses"] == pytest.approx(result(folder, "online")["losses"], rel=1e-4)
    assert actual["samples_trained"] == result(folder, "online")["samples_trained"]
    assert keys(services) == "0"


def begin_narrow(three, name: str) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """A run at its step 2. Capture is two windows ahead at most, so whoever is cut off, training soon waits."""
    producer, trainer, services, settings = three
    settings = (*settings, f"run_name={name}", "topology.high_refs=16")
    producing = producer.train(*settings, "role=producer")
    training = trainer.train(*settings, "role=trainer")
    wait_until(lambda: steps(services, name) >= 2, 180, trainer.shown)
    return producing, training


@pytest.mark.nightly
def test_links_that_are_cut_and_healed(folder, three):
    producer, trainer, services, _ = three
    producing, training = begin_narrow(three, "cut")
    last = 2
    for host in (producer, trainer, services):
        before, after = cut_for(host, services, "cut", 8)
        assert last <= before <= after < NUM_STEPS, "the cut came too late"
        wait_until(lambda seen=after: steps(services, "cut") > seen, 60, trainer.shown)
        last = after + 1
    ends_well(training, trainer)
    ends_well(producing, producer)
    assert result(trainer.folder, "cut")["losses"] == result(folder, "online")["losses"]
    assert keys(services) == "0"


@pytest.mark.parametrize("cut_off", [nightly("producer"), "trainer", nightly("services")])
def test_a_link_that_is_cut_for_20_seconds(folder, three, cut_off):
    hosts = dict(zip(("producer", "trainer", "services"), three, strict=False))
    services, trainer = hosts["services"], hosts["trainer"]
    producing, training = begin_narrow(three, cut_off)
    before, after = cut_for(hosts[cut_off], services, cut_off, 20)
    assert 2 <= before <= after < NUM_STEPS, "the cut came too late"
    assert after - before <= (3 if cut_off == "producer" else 1), "what was there is trained, and no more"
    ends_well(training, trainer)
    ends_well(producing, hosts["producer"])
    assert result(trainer.folder, cut_off)["losses"] == result(folder, "online")["losses"]
    assert keys(services) == "0"


def test_a_trainer_that_is_cut_off_and_replaced(folder, three):
    """Whoever queues jobs may start another meanwhile; when the first is back, it ends and takes nothing from the other."""
    producer, trainer, services, settings = three
    (services.folder / "secret").write_text(SECRET)
    producing, training = begin_narrow(three, "replaced")
    settings = (*settings, "run_name=replaced", "topology.high_refs=16", "role=trainer")
    second = services.train(*settings, own_processes=True)
    trainer.cut()  # before the other can have looked
    wait_until(lambda: redis(services, "HGET", "ldf:{replaced}:totals", "term") == "2", 180, services.shown)
    trainer.heal()
    wait_until(lambda: training.poll() is not None, 120, trainer.shown)
    assert training.returncode == 75, trainer.shown()
    assert "took over this run because this process had gone silent" in trainer.shown()
    ends_well(second, services)
    ends_well(producing, producer)
    assert result(services.folder, "replaced")["losses"] == result(folder, "online")["losses"]
    assert keys(services) == "0"


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 4])
def test_random_cuts_and_kills(folder, tmp_path, seed):
    """Behind one of the cuts the trainer is killed (seed 1), or both producers (seed 4)."""
    num_cuts, num_kills = run_trial(tmp_path, random_cuts(random.Random(seed)), result(folder, "online"))
    assert num_cuts >= 1
    assert num_kills == 1
