"""Whole runs that NaN or infinity ends: one line, no checkpoint from then on, a result that says why."""

import json

import pytest

from tests.processes import TINY, TRAIN, nightly, python, slow

EVERY_STEP = ("callbacks.checkpoint.every_n_train_steps=1",)
TWO_RANKS = ("trainer=ddp", "trainer.devices=2")
SHARDED = ("trainer=fsdp2", "trainer.devices=2")
DISAGG = ("topology=disagg_online", "store.capacity_bytes=64000000", "topology.restarts=2")


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
