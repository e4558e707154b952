"""Producer, trainer and store on hosts of their own, with no folder in common."""

import subprocess
import time

import pytest

from tests.processes import TINY, TRAIN, python, result, wait_until
from tests.system.hosts import Host, hosts, start_services, why_not

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SECRET = "not to be seen"
LONG = (*TINY, "trainer.max_steps=24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where one process has trained in topology=online."""
    folder = tmp_path_factory.mktemp("hosts")
    python(TRAIN, *LONG, "topology=online", "run_name=online", cwd=folder)
    return folder


@pytest.fixture
def three(tmp_path):
    """(producers, trainer, services), and the settings of parts."""
    with hosts(tmp_path, ("producer", "trainer", "services")) as (producer, trainer, services):
        for host in (producer, trainer):
            (host.folder / "secret").write_text(SECRET.replace(" ", "-"))
        settings = start_services(services, SECRET.replace(" ", "-"))
        time.sleep(2)
        yield producer, trainer, services, (*LONG, "topology=disagg_online", *settings, "topology.idle_timeout_s=120")


def ends_well(process: subprocess.Popen[bytes], host: Host, timeout_s: float = 240) -> None:
    wait_until(lambda: process.poll() is not None, timeout_s, host.shown)
    assert process.returncode == 0, host.shown()
    assert SECRET.replace(" ", "-") not in host.shown()


def keys(services: Host) -> str:
    """What is left in the Redis."""
    command = ("ip", "netns", "exec", services.space, "redis-cli", "-h", services.address, "--no-auth-warning", "-a")
    shown = subprocess.run([*command, SECRET.replace(" ", "-"), "DBSIZE"], capture_output=True, text=True)
    return shown.stdout.strip()


def test_one_rank_has_the_losses_of_one_process(folder, three):
    producer, trainer, services, settings = three
    producing = producer.train(*settings, "run_name=one", "role=producer")
    ends_well(trainer.train(*settings, "run_name=one", "role=trainer"), trainer)
    ends_well(producing, producer)
    assert result(trainer.folder, "one")["losses"] == result(folder, "online")["losses"]
    assert keys(services) == "0"


def test_two_ranks(folder, three):
    producer, trainer, services, settings = three
    settings = (*settings, "run_name=two")
    producing = [producer.train(*settings, "role=producer") for _ in range(2)]
    ends_well(trainer.train(*settings, "role=trainer", "trainer=ddp", "trainer.devices=2", ranks=2), trainer)
    for one in producing:
        ends_well(one, producer)
    assert result(trainer.folder, "two")["losses"] == pytest.approx(result(folder, "online")["losses"], rel=1e-4)
    assert keys(services) == "0"


def test_links_that_are_cut_and_healed(folder, three):
    producer, trainer, services, settings = three
    settings = (*settings, "run_name=cut")
    producing = producer.train(*settings, "role=producer")
    training = trainer.train(*settings, "role=trainer", "callbacks.checkpoint.every_n_train_steps=2")
    checkpoints = trainer.folder / "runs" / "cut" / "checkpoints"
    wait_until(lambda: list(checkpoints.glob("*.ckpt")), 180, trainer.shown)
    for host in (producer, trainer, services):
        host.cut()
        time.sleep(8)
        host.heal()
        time.sleep(1)
    ends_well(training, trainer)
    ends_well(producing, producer)
    assert result(trainer.folder, "cut")["losses"] == result(folder, "online")["losses"]
    assert keys(services) == "0"
