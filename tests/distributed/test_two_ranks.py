"""Two ranks on gloo give what one process gives."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.processes import ROOT, TINY, TRAIN, nightly, python, result, slow, torchrun, with_strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder where one process has trained 8 steps."""
    folder = tmp_path_factory.mktemp("ranks")
    python(TRAIN, *TINY, "topology=online", "run_name=one", cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("trainer", "topology"),
    [("ddp", "online"), slow("fsdp2", "online"), nightly("ddp", "offline")],
)
def test_losses_are_those_of_one_process(folder, trainer, topology):
    name = f"{trainer}-{topology}"
    torchrun(
        TRAIN, *TINY, f"topology={topology}", f"trainer={trainer}", "trainer.devices=2", f"run_name={name}", cwd=folder
    )
    one, two = result(folder, "one"), result(folder, name)
    assert two["world_size"] == 2
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["samples_trained"] == one["samples_trained"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [nightly("dflash"), nightly("domino")])
def test_losses_of_other_strategies_are_those_of_one_process(folder, strategy):
    """24 steps go over the prompts twice: anchors do not depend on the rank that draws them."""
    tiny = (*with_strategy(TINY, strategy), "trainer.max_steps=24")
    python(TRAIN, *tiny, f"run_name={strategy}", cwd=folder)
    one = result(folder, strategy)
    assert len(one["losses"]) == 24
    for trainer in ("ddp", "fsdp2"):
        name = f"{strategy}-{trainer}"
        torchrun(TRAIN, *tiny, f"trainer={trainer}", "trainer.devices=2", f"run_name={name}", cwd=folder)
        two = result(folder, name)
        assert two["world_size"] == 2
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert two["samples_trained"] == one["samples_trained"] == 192


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["eagle3", nightly("dflash"), nightly("domino")])
def test_gradients_and_a_clipped_sgd_step_are_those_of_one_process(tmp_path, target_path, conversations, strategy):
    """AdamW and losses alone would hide a gradient of the wrong scale. Gradients are those before clipping."""
    worker, saved = str(ROOT / "tests" / "distributed" / "sgd_worker.py"), {}
    for trainer in ("one", "ddp", "fsdp2"):
        output = tmp_path / f"{trainer}.pt"
        arguments = (worker, strategy, str(target_path), str(conversations), trainer, "0.05", str(output))
        (python if trainer == "one" else torchrun)(*arguments, cwd=tmp_path)
        saved[trainer] = torch.load(output, weights_only=True)
    for trainer in ("ddp", "fsdp2"):
        for kind, expected in saved["one"].items():
            assert expected.keys() == saved[trainer][kind].keys()
            for name, tensor in expected.items():
                difference = (saved[trainer][kind][name] - tensor).abs().max()
                assert difference < 1e-5 * tensor.abs().max(), f"{trainer} {kind} {name}"


@pytest.mark.slow
def test_one_process_resumes_what_two_ranks_began(folder):
    """The same samples in the same steps, with the same global batch on another number of ranks."""
    stop = f"{ROOT}/tests/distributed/stop_after.py"
    common = (*TINY, "run_name=shrunk", "callbacks.checkpoint.every_n_train_steps=3")
    torchrun(stop, "5", *common, "trainer=ddp", "trainer.devices=2", cwd=folder, status=1)
    python(TRAIN, *common, "ckpt_path=last", cwd=folder)
    shrunk, one = result(folder, "shrunk"), result(folder, "one")
    assert shrunk["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert shrunk["samples_trained"] == one["samples_trained"]


@pytest.mark.slow
def test_fsdp2_resumes_from_a_sharded_checkpoint_which_evaluates(folder):
    """4 steps on two ranks, 4 more after a restart; the last draft is measured in one process."""
    common = (*TINY, "trainer=fsdp2", "trainer.devices=2", "run_name=resumed")
    stop = f"{ROOT}/tests/distributed/stop_after.py"
    torchrun(stop, "5", *common, "callbacks.checkpoint.every_n_train_steps=4", cwd=folder, status=1)
    torchrun(TRAIN, *common, "ckpt_path=last", cwd=folder)
    assert result(folder, "resumed")["losses"] == pytest.approx(result(folder, "one")["losses"], rel=1e-4)
    checkpoint = folder / "runs" / "resumed" / "checkpoints" / "step-000008.ckpt"
    assert checkpoint.is_dir()
    options = (f"evaluate.checkpoint='{checkpoint}'", "run_name=evaluation")
    shown = python("-m", "lightning_dataflow", "evaluate", *TINY, *options, cwd=folder).stdout
    assert "num_identical               8" in shown


@pytest.mark.slow
def test_lightnings_own_launcher_and_evaluation_over_ranks(folder):
    """`python train.py trainer.devices=2` starts the second rank itself; ranks share the held-out prompts."""
    options = ("trainer=fsdp2", "trainer.devices=2", "run_name=launched", "callbacks=default")
    python(TRAIN, *TINY, *options, cwd=folder)
    launched = result(folder, "launched")
    assert launched["losses"] == pytest.approx(result(folder, "one")["losses"], rel=1e-4)
    assert [one["num_prompts"] for one in launched["acceptance"]] == [8, 8]


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="threads of their own priority are Linux's")
def test_a_rank_ends_well_when_gloo_comes_late(tmp_path):
    """A gloo thread that frees a tensor while the interpreter ends aborts the process: two runs of three without a wait."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        for _ in range(4):
            torchrun(str(ROOT / "tests" / "distributed" / "exit_worker.py"), cwd=tmp_path)
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("fused", ["fused", nightly("default")])
@pytest.mark.parametrize("trainer", ["fsdp2", nightly("ddp"), nightly("fsdp1")])
def test_a_bad_step_of_one_rank_changes_nothing_on_any(tmp_path, target_path, conversations, trainer, fused):
    worker, output = str(ROOT / "tests" / "distributed" / "bad_step_worker.py"), tmp_path / "skipped.json"
    torchrun(worker, str(target_path), str(conversations), trainer, fused, str(output), cwd=tmp_path)
    assert json.loads(output.read_text()) == [4, 5, 6, 7]
