"""Producers, trainers and Mooncake as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_dataflow.services.mooncake import LocalMooncake
from tests.processes import (
    BUSY,
    ROOT,
    TINY,
    TRAIN,
    environment,
    nightly,
    processes_in,
    python,
    restore_sigint,
    result,
    slow,
    wait_until,
    with_strategy,
)

DISAGG = (*TINY, "topology=disagg_online", "store.capacity_bytes=64000000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder where one process has trained 8 steps in topology=online."""
    folder = tmp_path_factory.mktemp("disaggregated")
    python(TRAIN, *TINY, "topology=online", "run_name=online", cwd=folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(folder):
    yield
    wait_until(lambda: not processes_in(folder), 10, lambda: f"processes left: {processes_in(folder)}")


@contextmanager
def started(folder: Path, *arguments: str, variables: dict[str, str] | None = None):
    """A command in the background, with its output in a file; killed if it is still there at the end."""
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, TRAIN, *arguments],
            cwd=folder,
            env=environment() | (variables or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=restore_sigint,
        )
        process.shown = lambda: (folder / "output.txt").read_text()
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def status(folder: Path, run_name: str) -> dict:
    shown = python("-m", "lightning_dataflow", "status", f"runs/{run_name}", "--json", "--interval=0.1", cwd=folder)
    return json.loads(shown.stdout)


@pytest.mark.slow
def test_the_full_control_plane_in_one_process(folder):
    python(TRAIN, *TINY, "topology=online", "control=memory", "run_name=colocated", cwd=folder)
    assert result(folder, "colocated")["losses"] == result(folder, "online")["losses"]


@pytest.mark.slow
def test_a_strategy_from_outside_the_package(folder):
    """Its losses fall, are the same streamed as online, and its draft decodes without changing the target's output."""
    recipe = ROOT / "recipes" / "own_strategy"
    own = (f"--config-dir={recipe / 'conf'}", "strategy=one_step", "imports=[one_step]", "experiment=tiny", "logger=none")
    path = {"PYTHONPATH": f"{ROOT}:{recipe}"}
    for topology in ("online", "disagg_online"):
        python(TRAIN, *own, f"topology={topology}", f"run_name=own-{topology}", cwd=folder, variables=path)
    online, streamed = result(folder, "own-online"), result(folder, "own-disagg_online")
    assert online["losses"] == streamed["losses"]
    assert online["losses"][-1] < online["losses"][0]
    checkpoint = folder / "runs" / "own-online" / "checkpoints" / "step-000008.ckpt"
    command = ("-m", "lightning_dataflow", "evaluate", *own, f"evaluate.checkpoint='{checkpoint}'")
    assert "num_identical               8" in python(*command, cwd=folder, variables=path).stdout
    wrong = python(TRAIN, "imports=[nothing_here]", "experiment=tiny", cwd=folder, status=1)
    assert wrong.stderr.startswith("error: imports=[nothing_here] cannot be imported")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [nightly("ddp"), "fsdp2"])
def test_two_ranks(folder, trainer):
    python(TRAIN, *DISAGG, f"trainer={trainer}", "trainer.devices=2", f"run_name={trainer}", cwd=folder)
    actual, expected = result(folder, trainer), result(folder, "online")
    assert actual["world_size"] == 2
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert actual["samples_trained"] == expected["samples_trained"]


@pytest.mark.parametrize("moment", ["mooncake", slow("announced"), nightly("import")])
def test_ctrl_c_while_starting(folder, moment):
    signs = {"import": "", "mooncake": "Mooncake at", "announced": "waiting for the trainer to begin"}
    with started(folder, *DISAGG, f"run_name=early-{moment}") as process:
        wait_until(lambda: signs[moment] in process.shown(), 60, process.shown)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=BUSY * 10) in (130, -signal.SIGINT)
        past_imports = [line for line in process.shown().splitlines() if not line.startswith("[trainer]")]
        assert "Traceback" not in "".join(past_imports) or moment != "announced"
    assert not processes_in(folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["eagle3", nightly("dflash"), nightly("domino")])
def test_ctrl_c_while_training_and_an_exact_resume(folder, strategy):
    straight, stopped = f"straight-{strategy}", f"stopped-{strategy}"
    settings = (*with_strategy(DISAGG, strategy), "trainer.max_steps=30", "callbacks.checkpoint.every_n_train_steps=2")
    python(TRAIN, *settings, "topology=online", "store=memory", "control=noop", f"run_name={straight}", cwd=folder)
    with started(folder, *settings, f"run_name={stopped}") as process:
        checkpoints = folder / "runs" / stopped / "checkpoints"
        wait_until(lambda: list(checkpoints.glob("step-00000[4-9].ckpt")), 60, process.shown)
        during = status(folder, stopped)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=BUSY * 10) == 130
        assert "Traceback" not in process.shown()
    assert not processes_in(folder)
    assert during["finished"] is None
    assert during["refs_in_flight"] > 0
    after = status(folder, stopped)
    assert after["finished"] == "interrupted"
    assert after["refs_in_flight"] == after["leased"] == 0
    assert result(folder, stopped)["status"] == "interrupted"
    python(TRAIN, *settings, f"run_name={stopped}", "ckpt_path=last", cwd=folder)
    resumed, undisturbed = result(folder, stopped), result(folder, straight)
    assert len(resumed["losses"]) == 30
    assert resumed["losses"] == undisturbed["losses"]
    assert resumed["samples_trained"] == undisturbed["samples_trained"]


@pytest.mark.slow
def test_a_run_that_runs_is_not_started_again(folder):
    """The second start touches neither Mooncake nor the ledger of the first."""
    command = (*DISAGG, "trainer.max_steps=1000", "run_name=twice")
    with started(folder, *command) as process:
        checkpoints = folder / "runs" / "twice" / "checkpoints"
        wait_until(lambda: list(checkpoints.glob("*.ckpt")), 60, process.shown)
        before = len(processes_in(folder))
        again = python(TRAIN, *command, "ckpt_path=last", cwd=folder, status=1)
        assert f"error: runs/twice is in use by process {process.pid} on " in again.stderr
        assert "Mooncake" not in again.stdout
        assert len(processes_in(folder)) == before
        process.terminate()
        assert process.wait(timeout=BUSY * 10) == 143
    assert status(folder, "twice")["finished"] == "interrupted"


def find(folder: Path, text: str) -> int:
    """The process in `folder` whose command line contains `text`."""
    return next(pid for pid, line in processes_in(folder).items() if text in line)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("role=producer", "error: producer-0: was killed by SIGKILL"),
        slow("role=trainer", "error: trainer: was killed by SIGKILL"),
        nightly("mooncake_client", "error: mooncake_client ended with status -9, see"),
        nightly("mooncake_master", "error: mooncake_master ended with status -9, see"),
    ],
)
def test_a_part_that_dies_ends_the_run(folder, part, message):
    name = f"dies-{len(part)}"
    with started(folder, *DISAGG, "trainer.max_steps=1000", f"run_name={name}") as process:
        wait_until(lambda: "tokens/s" in process.shown() or "it/s" in process.shown(), 60, process.shown)
        os.kill(find(folder, part), signal.SIGKILL)
        assert process.wait(timeout=BUSY * 20) == 1
        assert message in process.shown()
        assert "Traceback" not in process.shown()


@pytest.mark.slow
def test_a_supervisor_that_is_killed_leaves_nothing(folder):
    """Its run can be resumed at once."""
    settings = (*DISAGG, "callbacks.checkpoint.every_n_train_steps=2", "run_name=orphaned")
    with started(folder, *settings, "trainer.max_steps=1000") as process:
        checkpoints = folder / "runs" / "orphaned" / "checkpoints"
        wait_until(lambda: list(checkpoints.glob("*.complete")), 60, process.shown)
        process.kill()
        wait_until(lambda: not processes_in(folder), 20, lambda: f"left: {processes_in(folder)}")
    last = max(int(path.name[5:11]) for path in checkpoints.glob("*.complete"))
    python(TRAIN, *settings, f"trainer.max_steps={last + 2}", "ckpt_path=last", cwd=folder)
    assert result(folder, "orphaned")["optimizer_steps"] == last + 2


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [nightly(0), nightly(2)])
def test_a_trainer_that_waits_for_its_first_sample_ends_with_its_supervisor(folder, prefetch, tmp_path_factory):
    """The producer is stopped before its first put."""
    name = f"waits-{prefetch}"
    settings = (*DISAGG, f"data.prefetch_windows={prefetch}", f"run_name={name}", "imports=[tests.system.chaos.faults]")
    stop = {"part": "producer-0", "moment": "before put", "count": 1, "action": "stop", "seconds": 60}
    chaos = tmp_path_factory.mktemp("chaos")
    (chaos / "faults.json").write_text(json.dumps([stop]))
    with started(folder, *settings, variables={"CHAOS": str(chaos)}) as process:
        wait_until((chaos / "happened-0").exists, 60, process.shown)
        wait_until(lambda: "waiting for" in str(status(folder, name)), 60, process.shown)
        process.kill()
        wait_until(lambda: not processes_in(folder), 15, lambda: f"left: {processes_in(folder)}")


def keys(mooncake: LocalMooncake) -> str:
    """The keys in the store."""
    with urllib.request.urlopen(f"http://{mooncake.metrics_address}/get_all_keys") as answer:
        return answer.read().decode().strip()


@pytest.mark.slow
def test_parts_started_by_hand(folder, tmp_path):
    """A Mooncake started before, two producers, and a trainer of two ranks under torchrun; its store ends empty."""
    with LocalMooncake(capacity_bytes=64_000_000, log_dir=tmp_path) as mooncake:
        addresses = (
            f"store.address={mooncake.master_address}",
            f"store.client_address={mooncake.client_address}",
            f"store.metrics_address={mooncake.metrics_address}",
        )
        parts = (*TINY, "topology=disagg_online", *addresses, "run_name=by-hand")
        producers = [
            subprocess.Popen([sys.executable, TRAIN, *parts, "role=producer"], cwd=folder, env=environment())
            for _ in range(2)
        ]
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        python(*launcher, TRAIN, *parts, "role=trainer", "trainer=ddp", "trainer.devices=2", cwd=folder)
        assert [producer.wait(timeout=30) for producer in producers] == [0, 0]
        assert "by-hand" not in keys(mooncake)
    assert result(folder, "by-hand")["losses"] == pytest.approx(result(folder, "online")["losses"], rel=1e-4)


@pytest.mark.slow
def test_the_scripts_without_hydra(folder, tmp_path):
    """The same losses as train.py with the same settings, and an empty store at the end."""
    target, prompts = (str(folder / "assets" / "tiny" / name) for name in ("target", "conversations.jsonl"))
    recipe = ROOT / "recipes" / "plain_streaming"
    with LocalMooncake(capacity_bytes=200_000_000, log_dir=tmp_path) as mooncake:
        where = (str(tmp_path / "control"), mooncake.master_address, mooncake.client_address)
        command = [sys.executable, str(recipe / "producer.py"), target, prompts, *where]
        producer = subprocess.Popen(command, cwd=folder, env=environment())
        python(str(recipe / "train.py"), target, "4", *where, cwd=folder)
        assert producer.wait(timeout=30) == 0
        assert "plain" not in keys(mooncake)
    plain = json.loads(next((folder / "lightning_logs").rglob("result.json")).read_text())
    settings = ("strategy.draft_vocab_size=256", "optimizer.lr=1e-3", "data.num_eval_samples=0", "trainer.max_steps=4")
    python(TRAIN, *TINY, *settings, "trainer.gradient_clip_val=null", "run_name=same", cwd=folder)
    assert plain["losses"] == result(folder, "same")["losses"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("topology.high_bytes=1000",), "error: producer-0: a window can have"),
        nightly(("store.address=127.0.0.1:9",), "127.0.0.1:9"),
        nightly(("target.path=nowhere",), "no target model in nowhere"),
    ],
)
def test_a_part_with_bad_input_ends_the_run_with_its_message(folder, options, message):
    start = time.monotonic()
    shown = python(TRAIN, *DISAGG, *options, f"run_name=bad-{len(message)}", cwd=folder, status=1)
    (error,) = [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "Traceback" not in shown.stderr + shown.stdout
    assert time.monotonic() - start < 60
    assert str(ROOT) not in shown.stderr
