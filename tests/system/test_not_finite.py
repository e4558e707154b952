"""Whole runs with NaN or infinity: what is skipped, what ends the run, and which checkpoints are left."""

import json
import math
import time

import pytest
from safetensors.torch import load_file, save_file

from lightning_dataflow.targets import load_tokenizer
from lightning_dataflow.targets.tiny import write_tiny_conversations, write_tiny_target
from tests.processes import BUSY, TINY, TRAIN, nightly, python, result, slow

EVERY_STEP = ("callbacks.checkpoint.every_n_train_steps=1",)
RARE, RECORD = "~", 63
"""A token that only this record has, which is the sixth sample, on the second rank."""
TWO_RANKS = ("trainer=ddp", "trainer.devices=2")
SHARDED = ("trainer=fsdp2", "trainer.devices=2")
INTERLEAVED = ("topology=interleaved",)
DISAGG = ("topology=disagg_online", "store.capacity_bytes=64000000", "topology.restarts=2")
DURABLE = (*DISAGG, "topology.release_at=durable")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """make(name): a copy of the tiny target to damage, as (folder, tensors, settings that name it)."""

    def make(name):
        folder = write_tiny_target(tmp_path_factory.mktemp(name) / "target")
        tensors = load_file(folder / "model.safetensors")
        settings = ("target.prepare=null", f"target.path={folder}")
        return folder, tensors, settings

    return make


def write_records(path):
    write_tiny_conversations(path)
    lines = path.read_text().splitlines()
    record = json.loads(lines[RECORD])
    record["conversations"][0]["value"] += RARE
    lines[RECORD] = json.dumps(record)
    path.write_text("\n".join(lines))
    return path


def save(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def nan_in_an_embedding(target):
    """Of a token that one sample has."""
    folder, tensors, settings = target("embedding")
    records = write_records(folder.with_name("conversations.jsonl"))
    (token,) = load_tokenizer(folder)(RARE, add_special_tokens=False)["input_ids"]
    tensors["model.embed_tokens.weight"][token] = math.nan
    save(folder, tensors)
    return *settings, "data.prepare=null", f"data.path={records}"


def fail(folder, *settings) -> tuple[str, dict, list[str]]:
    """A failed run in `folder`: its error line, `result.json`, and its checkpoints."""
    start = time.monotonic()
    shown = python(TRAIN, *TINY, *settings, "run_name=fails", cwd=folder, status=1)
    assert time.monotonic() - start < 120 * BUSY, "one part waited for another"
    output = shown.stdout + shown.stderr
    assert "Traceback" not in output
    assert "starts again" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    run = folder / "runs" / "fails"
    result = json.loads((run / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["status"].startswith(("failed: step ", "failed: trainer: step "))
    return error, result, sorted(path.name for path in run.glob("checkpoints/*"))


EVERYWHERE = ["online", "ddp", "interleaved", "fsdp2", "disagg_online", "durable"]


@pytest.mark.parametrize(
    "settings",
    [(), nightly(TWO_RANKS), nightly(INTERLEAVED), nightly(SHARDED), slow(DISAGG), nightly(DURABLE)],
    ids=EVERYWHERE,
)
def test_a_learning_rate_that_spoils_the_draft(tmp_path, settings):
    """The first step makes weights that are finite, and no loss is from then on."""
    error, result, checkpoints = fail(tmp_path, "optimizer.lr=1e20", *settings)
    assert "step 4, of samples " in error
    assert "(seq 24 to 31): the loss is NaN or infinity: start again with a lower optimizer.lr" in error
    assert "; 3 bad steps in a row (trainer.max_bad_steps=3); ended at step 4 without a checkpoint" in error
    assert checkpoints == []
    assert result["optimizer_steps"] == 4 and result["losses"][1:] == [None] * 3
    assert (result["samples_trained"], result["samples_skipped"]) == (8, 24)


@pytest.mark.parametrize(
    "settings",
    [(), nightly(TWO_RANKS), nightly(INTERLEAVED), slow(SHARDED), nightly(DISAGG), nightly(DURABLE)],
    ids=EVERYWHERE,
)
def test_no_checkpoint_holds_what_a_learning_rate_spoiled(tmp_path, settings):
    error, result, checkpoints = fail(tmp_path, "optimizer.lr=1e20", *EVERY_STEP, *settings)
    assert "step 1, of samples " in error
    assert "(seq 0 to 7): the loss through the draft's weights after it is NaN or infinity, so they are not saved" in error
    assert checkpoints == []
    assert result["optimizer_steps"] == len(result["losses"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [nightly(()), SHARDED], ids=["online", "fsdp2"])
def test_a_last_step_that_spoils_the_draft(tmp_path, settings):
    """Weight decay and step together overflow in the last step, and no later loss would show it."""
    optimizer = (
        "optimizer.lr=3.3e38",
        "optimizer.betas=[0.0,0.95]",
        "optimizer.weight_decay=1.0",
        "optimizer.warmup_ratio=0",
    )
    error, _, checkpoints = fail(tmp_path, "trainer.max_steps=1", *optimizer, *settings)
    assert "step 1, of samples " in error and "the draft's weights hold NaN or infinity" in error
    assert checkpoints == []


@pytest.mark.parametrize(
    "settings",
    [nightly(TWO_RANKS), nightly(()), nightly(INTERLEAVED), slow(DISAGG), nightly(DURABLE)],
    ids=["ddp", "online", "interleaved", "disagg_online", "durable"],
)
def test_a_target_with_nan_in_an_embedding(tmp_path, nan_in_an_embedding, settings):
    """Only that sample is skipped. With two ranks only one captures it, and both know; a resumed run does too."""
    shown = python(TRAIN, *TINY, *nan_in_an_embedding, *settings, "run_name=nan", cwd=tmp_path)
    reason = f"aux_hidden_states (layer 1) of sample {RECORD + 1:08d} holds NaN or infinity"
    assert f"1 samples were not trained: seq 5 ({reason})" in shown.stdout  # the log of another rank is not shown
    run = result(tmp_path, "nan")
    assert run["status"] == "completed"
    assert run["seqs_skipped_while_training"] == [5]
    assert run["samples_skipped_by_reason"] == {reason: 1}
    assert run["samples_trained"] == 64 - 1
    assert None not in run["losses"]
    checkpoints = tmp_path / "runs" / "nan" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("*.complete")) == [
        f"step-00000{step}.ckpt.complete" for step in (4, 8)
    ]
    again = ("run_name=nan", "ckpt_path=last", "trainer.max_steps=9")
    python(TRAIN, *TINY, *nan_in_an_embedding, *settings, *again, cwd=tmp_path)
    assert result(tmp_path, "nan")["seqs_skipped_while_training"] == [5]
