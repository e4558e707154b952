"""Samples whose features hold NaN are skipped where they are captured, alike in every topology; a target that gives nothing
else ends the run."""

import functools

import pytest
from safetensors.torch import load_file, save_file

from lightning_dataflow.targets import load_tokenizer
from lightning_dataflow.targets.tiny import write_tiny_target
from tests.processes import TINY, TRAIN, nightly, processes_in, python, result, slow, wait_until

RARE = "k"
"""A token that few of the samples have."""
SAME = ("losses", "samples_trained", "samples_skipped_by_reason", "seqs_skipped_while_training", "optimizer_steps")
ROOM = "store.capacity_bytes=64000000"
STREAMED = ("topology=disagg_online", ROOM)
RANKS = ("trainer=ddp", "trainer.devices=2")
ELSEWHERE = {
    "interleaved": ("topology=interleaved",),
    "offline": ("topology=offline",),
    "disagg_online": STREAMED,
    "disagg_offline": ("topology=disagg_offline", ROOM),
}


def damage(folder, change):
    """A tiny target whose tensors `change` edits."""
    tensors = load_file(write_tiny_target(folder) / "model.safetensors")
    change(tensors, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ("target.prepare=null", f"target.path={folder}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def broken_token(tmp_path_factory):
    """NaN in the embedding of one token."""

    def change(tensors, folder):
        (token,) = load_tokenizer(folder)(RARE, add_special_tokens=False)["input_ids"]
        tensors["model.embed_tokens.weight"][token] = float("nan")

    return damage(tmp_path_factory.mktemp("token") / "target", change)


@pytest.fixture(scope="module")
def trained(folder, broken_token):
    """trained(name, *settings) → (result, output) of six steps, of which one and a half are a second pass."""

    @functools.cache
    def run(name: str, *settings: str, **options) -> tuple[dict, str]:
        common = ("trainer.max_steps=6", "data.num_samples=36", "callbacks=no_evaluation", f"run_name={name}")
        shown = python(TRAIN, *TINY, *broken_token, *common, *settings, cwd=folder, **options)
        wait_until(lambda: not processes_in(folder), 10, lambda: f"processes left: {processes_in(folder)}")
        return result(folder, name), shown.stdout + shown.stderr

    return run


def test_a_broken_sample_is_named_and_counted(trained):
    found, output = trained("online")
    reasons, seqs = found["samples_skipped_by_reason"], found["seqs_skipped_while_training"]
    assert seqs and found["samples_trained"] == 48 - len(seqs)
    assert sum(reasons.values()) == found["samples_skipped"] == len(seqs)
    for reason in reasons:
        assert reason.startswith("aux_hidden_states (layer 1) of sample ")
        assert reason.endswith(" holds NaN or infinity")
    assert output.count("skipped: aux_hidden_states (layer 1) of sample ") == min(len(reasons), 8)
    assert f"{len(seqs)} samples were not trained: seq {seqs[0]} (" in output
    assert found["status"] == "completed" and None not in found["losses"]


@pytest.mark.parametrize(
    "where", [slow("offline"), slow("disagg_online"), nightly("interleaved"), nightly("disagg_offline")]
)
def test_every_topology_trains_the_same_windows(trained, where):
    here, online = trained(where, *ELSEWHERE[where])[0], trained("online")[0]
    assert {key: here[key] for key in SAME} == {key: online[key] for key in SAME}


@pytest.mark.parametrize("packed", [slow(("topology=interleaved",)), nightly(STREAMED)])
def test_packed_rows_too(trained, packed):
    rows = ("data.row_tokens=256", "data.rows_per_step=2")
    here, online = trained("packed-" + packed[0][9:], *packed, *rows)[0], trained("packed", *rows)[0]
    assert {key: here[key] for key in SAME} == {key: online[key] for key in SAME}


@pytest.mark.parametrize("settings", [slow(()), nightly(("topology=interleaved",)), nightly(STREAMED)])
def test_ranks_tell_each_other(trained, settings):
    """`result.json` is the first rank's, and in `online` each rank captures its own samples."""
    two, one = trained("ranks" + "".join(settings)[9:15], *RANKS, *settings)[0], trained("online")[0]
    same = [key for key in SAME if key != "losses"]
    assert {key: two[key] for key in same} == {key: one[key] for key in same}
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)


@pytest.mark.parametrize("settings", [slow(()), nightly(STREAMED)])
def test_a_resume_skips_the_same(trained, settings):
    name = "resumed" + "".join(settings)[9:15]
    trained(name, *settings, "callbacks.checkpoint.every_n_train_steps=3")
    half_way = f"ckpt_path=runs/{name}/checkpoints/step-000003.ckpt"
    resumed, whole = trained(name, *settings, half_way)[0], trained("online")[0]
    assert {key: resumed[key] for key in SAME} == {key: whole[key] for key in SAME}


@pytest.mark.parametrize(
    "settings",
    [(), nightly(RANKS), slow(("topology=interleaved",)), nightly(("topology=offline",)), nightly(STREAMED)],
    ids=["online", "ddp", "interleaved", "offline", "disagg_online"],
)
def test_a_target_that_gives_nothing_else_ends_the_run(tmp_path, settings):
    def change(tensors, folder):
        tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("inf")

    target = damage(tmp_path / "target", change)
    shown = python(TRAIN, *TINY, *target, *settings, "run_name=fails", cwd=tmp_path, status=1, timeout_s=180)
    output = shown.stdout + shown.stderr
    assert "Traceback" not in output and "starts again" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "aux_hidden_states (layer 3) of sample " in error
    assert " holds NaN or infinity, and so do all of the first 8 samples: check the target's weights" in error
    assert not list(tmp_path.glob("runs/fails/checkpoints/*.ckpt"))


@pytest.mark.slow
def test_the_capture_command_counts_them(tmp_path, broken_token):
    command = ("-m", "lightning_dataflow", "capture", *TINY, *broken_token, "store=shared_dir", "store.root=features")
    shown = python(*command, "data.num_samples=36", cwd=tmp_path).stdout
    assert " of them hold NaN or infinity and will be skipped: sample 000000" in shown
