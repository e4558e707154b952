"""Commands whose features come from a stock SGLang: their losses, their end, and a server that they lose."""

import signal
import subprocess
import sys
import threading

import pytest
import torch

from lightning_dataflow.control import RunPlan, resolve_control_plane
from lightning_dataflow.run.target import SHARED_MEMORY
from tests.processes import TINY, TRAIN, environment, processes_in, python, restore_sigint, result, wait_until
from tests.sglang.environment import ARGUMENTS, VARIABLES, sglang_python
from tests.system.sglang.conftest import KEY

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.mark.parametrize("strategy", ["eagle3", "dflash", "domino"])
def test_losses_are_those_of_hf(tmp_path, strategy):
    options = (*TINY[1:], f"strategy={strategy}")
    python(TRAIN, *options, "topology=online", "run_name=hf", cwd=tmp_path)
    flags = ",".join(f"'{part}'" for part in ARGUMENTS)
    served = ("topology=disagg_online", "target.engine=sglang_server", f"target.server_python={sglang_python()}")
    python(
        *(TRAIN, *options, *served, f"target.server_args=[{flags}]", "store.capacity_bytes=64000000", "run_name=served"),
        cwd=tmp_path,
        timeout_s=600,
        variables=VARIABLES,
    )
    actual, expected = result(tmp_path, "served"), result(tmp_path, "hf")
    assert actual["samples_trained"] == expected["samples_trained"] and actual["samples_skipped"] == 0
    torch.testing.assert_close(torch.tensor(actual["losses"]), torch.tensor(expected["losses"]), atol=1e-4, rtol=0)
    wait_until(lambda: not processes_in(tmp_path), 10, lambda: f"processes left: {processes_in(tmp_path)}")


def test_ctrl_c_ends_the_server_too_and_a_resume_goes_on(tmp_path):
    """With the losses of a run that was not interrupted."""
    flags = ",".join(f"'{part}'" for part in ARGUMENTS)
    served = ("target.engine=sglang_server", f"target.server_python={sglang_python()}", f"target.server_args=[{flags}]")
    options = (*TINY, "topology=disagg_online", "trainer.max_steps=40", "run_name=served", *served)
    with open(tmp_path / "output.txt", "w+") as output:
        run = subprocess.Popen(
            [sys.executable, TRAIN, *options],
            cwd=tmp_path,
            env=VARIABLES,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=restore_sigint,
        )
        shown = (tmp_path / "output.txt").read_text
        checkpoints = tmp_path / "runs" / "served" / "checkpoints"
        wait_until(lambda: any(checkpoints.glob("step-000008*")) or run.poll() is not None, 300, shown)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130, shown()
    wait_until(lambda: not processes_in(tmp_path), 10, lambda: f"processes left: {processes_in(tmp_path)}")
    python(TRAIN, *options, "ckpt_path=last", cwd=tmp_path, timeout_s=300, variables=VARIABLES)
    python(TRAIN, *TINY, "trainer.max_steps=40", "run_name=hf", cwd=tmp_path)
    actual, expected = result(tmp_path, "served"), result(tmp_path, "hf")
    assert actual["samples_trained"] == expected["samples_trained"] == 320
    torch.testing.assert_close(torch.tensor(actual["losses"]), torch.tensor(expected["losses"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("topology", ["online", "interleaved"])
def test_a_server_for_this_process_alone(tmp_path, topology):
    python(TRAIN, *TINY, "topology=online", "run_name=hf", cwd=tmp_path)
    flags = ",".join(f"'{part}'" for part in ARGUMENTS)
    run = subprocess.run(
        [
            *(sys.executable, TRAIN, *TINY, f"topology={topology}", "run_name=sglang"),
            *("target.engine=sglang", f"target.server_python={sglang_python()}", f"target.server_args=[{flags}]"),
        ],
        cwd=tmp_path,
        env=VARIABLES,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    actual, expected = (torch.tensor(result(tmp_path, name)["losses"]) for name in ("sglang", "hf"))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert not list(SHARED_MEMORY.glob("lightning-dataflow-*")), "nothing is left in memory"


def test_sigterm_ends_a_producer_and_its_server(tmp_path):
    flags = ",".join(f"'{part}'" for part in ARGUMENTS)
    settings = (
        *(*TINY, "topology=disagg_online", "store=shared_dir", "role=producer", "run_name=told"),
        *("target.engine=sglang", f"target.server_python={sglang_python()}", f"target.server_args=[{flags}]"),
    )
    with open(tmp_path / "output.txt", "w") as output:
        run = subprocess.Popen(
            [sys.executable, TRAIN, *settings],
            cwd=tmp_path,
            env=VARIABLES,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    shown = (tmp_path / "output.txt").read_text
    try:
        wait_until(lambda: "waiting for the trainer to begin" in shown() or run.poll() is not None, 300, shown)
        plane = resolve_control_plane("disaggregated", "told", path=tmp_path / "runs" / "told" / "control")
        plane.ledger.begin(RunPlan(start=0, stop=80, window=8), {}, frontier=0)
        wait_until(lambda: plane.ledger.status()["published"] > 1, 60, shown)
        run.terminate()
        assert run.wait(15) == 143, shown()
        assert plane.ledger.status()["leased"] == 0
        plane.close()
    finally:
        run.kill()
    wait_until(lambda: not processes_in(tmp_path), 10, lambda: f"processes left: {processes_in(tmp_path)}")


def test_the_command_prints_the_differences(tmp_path):
    flags = ",".join(f"'{part}'" for part in ARGUMENTS)
    shown = python(
        *("-m", "lightning_dataflow", "conformance", "experiment=tiny", "strategy=dflash", "topology=disagg_online"),
        *("store=shared_dir", "target.engine=sglang_server", f"target.server_python={sglang_python()}"),
        f"target.server_args=[{flags}]",
        cwd=tmp_path,
        timeout_s=300,
        variables=VARIABLES,
    ).stdout.splitlines()
    assert [line.rpartition("  ")[2] for line in shown[-12:]] == ["the same"] * 12
    assert shown[-13].split()[:3] == ["tokens", "asked", "for"]


def test_the_last_server_killed_is_a_clear_failure(start, target_path, tmp_path, mooncake):
    command = (
        *(TRAIN, *TINY, "topology=disagg_online", "target.engine=sglang_server", "run_name=lost", "trainer.max_steps=400"),
        *(f"store.address={mooncake.master_address}", f"store.metrics_address={mooncake.metrics_address}"),
        *(f"target.prepare={target_path}", "strategy.layer_ids=[1,3,4]", "store.capacity_bytes=60000000"),
        f"target.api_key_file={tmp_path / 'key'}",
    )
    (tmp_path / "key").write_text(KEY)
    with start() as server, open(tmp_path / "output.txt", "w+") as output:
        run = subprocess.Popen(
            [sys.executable, *command, f"target.urls=[{server.url}]"],
            cwd=tmp_path,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while (
            "POST /generate" not in server.log_path.read_text() or server.log_path.read_text().count("POST /generate") < 30
        ):
            assert run.poll() is None, (tmp_path / "output.txt").read_text()
            threading.Event().wait(0.1)
        server.close()
        assert run.wait(120) == 1
    last = (tmp_path / "output.txt").read_text().strip().splitlines()[-1]
    assert "no capture server has answered for" in last and "captured" in last
