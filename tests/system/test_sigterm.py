"""SIGTERM, as scancel, a preemption or the end of a container sends it, ends each part as Ctrl-C does."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from lightning_dataflow.control import RunPlan, resolve_control_plane
from tests.processes import TINY, TRAIN, environment, nightly, processes_in, result, wait_until
from tests.records import WIDE, failures
from tests.system.test_disaggregated import started, status

BY_HAND = (*TINY, "topology=disagg_online", "store=shared_dir", "store.capacity_bytes=64000000", "num_threads=1")
SLOW = "imports=[tests.system.slow_capture]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sigterm")


@pytest.fixture(autouse=True)
def nothing_is_left(folder):
    yield
    wait_until(lambda: not processes_in(folder), 10, lambda: f"processes left: {processes_in(folder)}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), nightly(signal.SIGINT, 130)])
def test_a_producer_gives_its_leases_back_and_that_counts_against_no_prompt(folder, number, code):
    name = f"told-{code}"
    with started(folder, *BY_HAND, "role=producer", SLOW, f"run_name={name}") as process:
        wait_until(lambda: "waiting for the trainer to begin" in process.shown(), 60, process.shown)
        plane = resolve_control_plane("disaggregated", name, path=folder / "runs" / name / "control")
        plane.ledger.begin(RunPlan(start=0, stop=8, window=8), {}, frontier=0)
        wait_until(lambda: "capturing" in process.shown(), 20, process.shown)
        process.send_signal(number)
        assert process.wait(timeout=10) == code
    lease = plane.lease("other", group=1, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=60.0)
    assert (lease.seqs, lease.tries, lease.attempt) == ((0,), 0, 1)
    assert failures(plane.ledger) == []
    plane.close()
    assert "Traceback" not in process.shown()


@contextmanager
def begun(folder, *arguments):
    """Like `started`, for a second process in the same folder."""
    path = folder / "begun.txt"
    with open(path, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    process.shown = path.read_text
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()


@pytest.mark.nightly
def test_the_capture_command(folder):
    command = ("-m", "lightning_dataflow", "capture", *TINY, "store=shared_dir", "store.root=features", SLOW)
    with begun(folder, *command) as process:
        wait_until(lambda: "capturing" in process.shown(), 60, process.shown)
        process.terminate()
        assert process.wait(timeout=10) == 143
    assert process.shown().endswith("terminated\n")
    assert "Traceback" not in process.shown()


def check_ended(folder, name: str) -> None:
    """The run has ended for its producers too, and its store is empty."""
    after = status(folder, name)
    assert after["finished"] == "interrupted"
    assert after["refs_in_flight"] == after["leased"] == 0
    assert not list((folder / "runs" / name / "control" / "features").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "launched"), [nightly(1, False), nightly(2, False), (2, True)])
def test_a_trainer_that_trains(folder, ranks, launched):
    """Started by hand, or by torchrun, which has its own exit status and messages. Producers end too."""
    name = f"trains-{ranks}-{launched}"
    settings = (*BY_HAND, "trainer.max_steps=1000", "callbacks.checkpoint.every_n_train_steps=4", f"run_name={name}")
    settings += ("trainer=ddp", f"trainer.devices={ranks}") if ranks > 1 else ()
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}") if launched else ()
    with started(folder, *settings, "role=producer") as producer:
        with begun(folder, *launcher, TRAIN, *settings, "role=trainer") as process:
            checkpoints = folder / "runs" / name / "checkpoints"
            wait_until(lambda: list(checkpoints.glob("*.complete")), 90, process.shown)
            process.terminate()
            code = process.wait(timeout=15)
        assert producer.wait(timeout=10) == 0
    assert launched or (code == 143 and "Traceback" not in process.shown())
    advice = rf"ended at step \d+; resume from step-\d+\.ckpt with ckpt_path=last run_name={name}"
    assert len(re.findall(advice, process.shown())) == 1
    check_ended(folder, name)
    assert result(folder, name)["status"] == "interrupted"


def waits_for_samples(folder, name: str) -> bool:
    states = {part["name"]: part["state"] for part in status(folder, name)["parts"]}
    return "samples of the window" in states.get("trainer-0", "")


@pytest.mark.slow
def test_a_trainer_that_waits_for_a_sample(folder):
    """Lightning's own handler would wait for the sample."""
    with started(folder, *BY_HAND, "role=producer", SLOW, "run_name=waits") as producer:
        wait_until(lambda: "waiting for the trainer to begin" in producer.shown(), 60, producer.shown)
        with begun(folder, TRAIN, *BY_HAND, "role=trainer", "run_name=waits") as process:
            wait_until(lambda: waits_for_samples(folder, "waits"), 60, process.shown)
            process.terminate()
            assert process.wait(timeout=10) == 143
        assert "Traceback" not in process.shown()
        producer.terminate()
        assert producer.wait(timeout=10) == 143
    check_ended(folder, "waits")


def end(folder, text: str) -> None:
    """All processes in `folder` whose command lines contain `text`."""
    for pid in [pid for pid, line in processes_in(folder).items() if text in line]:
        os.kill(pid, signal.SIGTERM)


@pytest.mark.nightly
def test_parts_of_a_supervised_run(folder):
    """A terminated trainer has not completed the run: a producer can start again."""
    steps = ("trainer.max_steps=1000", "callbacks.checkpoint.every_n_train_steps=4")
    settings = (*BY_HAND, *steps, "topology.restarts=1")
    with started(folder, *settings, "run_name=parts") as process:
        checkpoints = folder / "runs" / "parts" / "checkpoints"
        wait_until(lambda: list(checkpoints.glob("*.complete")), 90, process.shown)
        end(folder, "role=producer")
        wait_until(lambda: "producer-0: was ended by SIGTERM; starts again" in process.shown(), 20, process.shown)
        end(folder, "role=trainer")
        wait_until(lambda: "trainer: was ended by SIGTERM; starts again" in process.shown(), 20, process.shown)
        process.terminate()
        assert process.wait(timeout=10) == 143
    assert "Traceback" not in process.shown()


@pytest.mark.slow
def test_a_supervisor_and_all_its_parts_at_once(folder):
    """As the end of a container or of a SLURM job does it."""
    with started(folder, *BY_HAND, "trainer.max_steps=1000", "run_name=all") as process:
        wait_until(lambda: list((folder / "runs" / "all" / "checkpoints").glob("*")), 90, process.shown)
        end(folder, "")
        assert process.wait(timeout=10) == 143
    assert process.shown().splitlines().count("terminated") == 1
    assert "Traceback" not in process.shown()
    check_ended(folder, "all")
