"""Whole runs that NaN or infinity ends: one line, no checkpoint from then on, a result that says why."""

import json
import time

import pytest
from safetensors.torch import load_file, save_file

from lightning_dataflow.targets import load_tokenizer
from lightning_dataflow.targets.tiny import write_tiny_target
from tests.processes import TINY, TRAIN, nightly, python, slow

EVERY_STEP = ("callbacks.checkpoint.every_n_train_steps=1",)
RARE = "k"
"""A token that one of the first eight samples has, on the second rank."""
TWO_RANKS = ("trainer=ddp", "trainer.devices=2")
SHARDED = ("trainer=fsdp2", "trainer.devices=2")
DISAGG = ("topology=disagg_online", "store.capacity_bytes=64000000", "topology.restarts=2")


@pytest.fixture(scope="module")
def broken_target(tmp_path_factory):
    """A target with NaN in the embedding of one token."""
    folder = write_tiny_target(tmp_path_factory.mktemp("broken") / "target")
    (token,) = load_tokenizer(folder)(RARE, add_special_tokens=False)["input_ids"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ("target.prepare=null", f"target.path={folder}")


def fail(folder, *settings) -> tuple[str, dict, list[str]]:
    """A failed run in `folder`: its error line, `result.json`, and its checkpoints."""
    shown = python(TRAIN, *TINY, *EVERY_STEP, *settings, "run_name=fails", cwd=folder, status=1)
    output = shown.stdout + shown.stderr
    assert "Traceback" not in output
    assert "starts again" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    run = folder / "runs" / "fails"
    result = json.loads((run / "result.json").read_text(), parse_constant=pytest.fail)
    return error, result, sorted(path.name for path in run.glob("checkpoints/*.ckpt"))


@pytest.mark.parametrize(
    "settings",
    [(), nightly(TWO_RANKS), slow(SHARDED), slow(DISAGG)],
    ids=["online", "ddp", "fsdp2", "disagg_online"],
)
def test_a_learning_rate_that_spoils_the_draft(tmp_path, settings):
    error, result, checkpoints = fail(tmp_path, "optimizer.lr=1e20", *settings)
    assert "step 2, of samples " in error
    assert "(seq 8 to 15): the loss is NaN or infinity: start again with a lower optimizer.lr" in error
    assert error.endswith("ended at step 1; resume from step-000001.ckpt with ckpt_path=last run_name=fails")
    assert checkpoints == ["step-000001.ckpt"]
    assert result["status"].startswith("failed: ") and "step 2, of samples " in result["status"]
    assert result["optimizer_steps"] == len(result["losses"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), SHARDED], ids=["online", "fsdp2"])
def test_a_last_step_that_spoils_the_draft(tmp_path, settings):
    """Weight decay and step together overflow in the last step, and no later loss would show it."""
    optimizer = (
        "optimizer.lr=3.3e38",
        "optimizer.betas=[0.0,0.95]",
        "optimizer.weight_decay=1.0",
        "optimizer.warmup_ratio=0",
    )
    error, result, checkpoints = fail(tmp_path, "trainer.max_steps=1", *optimizer, *settings)
    assert "step 1, of samples " in error and "the draft's weights hold NaN or infinity" in error
    assert checkpoints == []
    assert result["status"].startswith("failed: step 1, of samples ")


@pytest.mark.parametrize(
    "settings",
    [
        TWO_RANKS,
        nightly(()),
        nightly(("topology=interleaved",)),
        slow(DISAGG),
    ],
    ids=["ddp", "online", "interleaved", "disagg_online"],
)
def test_features_that_are_not_finite(tmp_path, broken_target, settings):
    """With two ranks, only one has such features, and both end with the same error."""
    start = time.monotonic()
    error, result, checkpoints = fail(tmp_path, *broken_target, *settings)
    assert time.monotonic() - start < 120, "a rank waited for the other"
    assert "step 1, of samples " in error
    assert "aux_hidden_states of sample " in error and "holds NaN or infinity: check the target's weights" in error
    assert checkpoints == []
    assert result["status"].startswith("failed: ") and "aux_hidden_states of sample " in result["status"]


@pytest.mark.slow
def test_the_capture_command_leaves_nothing_to_train_on(tmp_path, broken_target):
    command = ("-m", "lightning_dataflow", "capture", *TINY, *broken_target, "store=shared_dir", "store.root=features")
    shown = python(*command, cwd=tmp_path, status=1).stderr
    assert "error: aux_hidden_states of sample " in shown and "Traceback" not in shown
    assert not (tmp_path / "features" / "manifest.json").exists()
