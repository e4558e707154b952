"""The export command on runs of every kind, and the commands that take a folder back."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import ROOT, TINY, TRAIN, nightly, python, result, torchrun, with_strategy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = (*TINY, "trainer.max_steps=3", "data.micro_batch_size=4")
STRATEGIES = ("eagle3", "dflash", "domino")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


def export(folder, run, *arguments):
    out = f"{run}-{'-'.join(arguments)}".replace("--", "")
    command = ("-m", "lightning_dataflow", "export", f"runs/{run}", "--out", f"drafts/{out}", *arguments)
    python(*command, cwd=folder)
    return folder / "drafts" / out


@pytest.mark.parametrize("strategy", ["eagle3", nightly("dflash"), nightly("domino")])
def test_sharded_and_ddp_runs_give_the_folder_of_one_process(folder, strategy):
    settings = with_strategy(SETTINGS, strategy)
    python(TRAIN, *settings, f"run_name=one-{strategy}", cwd=folder)
    one = load_file(export(folder, f"one-{strategy}", "--engine", "sglang", "--dtype", "float32") / "model.safetensors")
    assert len(one) > 10
    for trainer in ("ddp", "fsdp2") if strategy == "eagle3" else ("fsdp2",):
        run = f"{trainer}-{strategy}"
        torchrun(TRAIN, *settings, f"trainer={trainer}", "trainer.devices=2", f"run_name={run}", cwd=folder)
        checkpoint = folder / "runs" / run / "checkpoints" / "step-000003.ckpt"
        assert checkpoint.is_dir() == (trainer == "fsdp2")
        two = load_file(export(folder, run, "--engine", "sglang", "--dtype", "float32") / "model.safetensors")
        assert two.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.nightly
def test_checkpoints_of_fsdp1(tmp_path, target_path, conversations):
    """Sharded, and of the shape of a full one: with all tensors in the file."""
    worker = str(ROOT / "tests" / "distributed" / "fsdp1_worker.py")
    sharded, full = tmp_path / "sharded.ckpt", tmp_path / "full.ckpt"
    torchrun(worker, str(target_path), str(conversations), str(sharded), str(tmp_path / "state.pt"), cwd=tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (sharded / ".metadata").is_file() and len(state) > 10
    header = torch.load(sharded / "meta.pt", weights_only=True)
    torch.save(header | {"state_dict": {f"draft.{name}": tensor for name, tensor in state.items()}}, full)
    for checkpoint in (sharded, full):
        out = tmp_path / f"draft-{checkpoint.stem}"
        options = ("--engine", "sglang", "--dtype", "float32", "--out", str(out))
        python("-m", "lightning_dataflow", "export", str(checkpoint), *options, cwd=tmp_path)
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in exported.items())


def test_a_warm_start_goes_on_where_the_export_was(folder):
    """Also on two ranks, sharded: the first loss is that of the draft that was exported."""
    python(TRAIN, *SETTINGS, "run_name=first", cwd=folder)
    draft = export(folder, "first", "--engine", "vllm", "--format", "speculators", "--dtype", "float32")
    common = (*SETTINGS, f"strategy.init_from={draft}", "strategy.layer_ids=[1,3,4]", "trainer.max_steps=2")
    python(TRAIN, *common, "run_name=warm", cwd=folder)
    torchrun(TRAIN, *common, "trainer=fsdp2", "trainer.devices=2", "run_name=warm-fsdp2", cwd=folder)
    cold, warm, sharded = (result(folder, name)["losses"] for name in ("first", "warm", "warm-fsdp2"))
    assert warm[0] < cold[0] - 0.05, "the same samples, by a draft that has seen them"
    assert sharded == pytest.approx(warm, rel=1e-4)
    again = export(folder, "warm", "--engine", "sglang")
    assert f"| started from the draft | {draft.name} |" in (again / "README.md").read_text()
    shown = python(TRAIN, *common, "run_name=x", "strategy.draft_vocab_size=32", cwd=folder, status=1).stderr
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "other sizes than these settings say (draft_vocab_size=32): set strategy.draft_vocab_size=96" in errors[0]


def test_a_folder_is_measured_like_the_checkpoint_it_came_from(folder):
    python(TRAIN, *SETTINGS, "run_name=measured", cwd=folder)
    draft = export(folder, "measured", "--engine", "vllm", "--dtype", "float32")
    reports = []
    for source in ("runs/measured/checkpoints/step-000003.ckpt", str(draft)):
        options = (f"evaluate.checkpoint={source}", "evaluate.output=report.json", "data.num_eval_samples=4")
        python("-m", "lightning_dataflow", "evaluate", *SETTINGS, *options, cwd=folder)
        (report,) = json.loads((folder / "report.json").read_text())["measurements"]
        reports.append({name: report[name] for name in ("accepted_per_position", "num_drafts", "num_tokens")})
    assert reports[0] == reports[1]


def test_a_moving_average_is_exported_and_training_goes_on_from_the_weights(folder):
    """Averaging changes neither a loss, also after a resume, nor the vocabulary map."""
    ema = ("+callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging", "+callbacks.ema.decay=0.9")
    for run, settings in (("averaged", ema), ("plain", ())):
        python(TRAIN, *SETTINGS, *settings, f"run_name={run}", cwd=folder)
        python(TRAIN, *SETTINGS, *settings, f"run_name={run}", "ckpt_path=last", "trainer.max_steps=6", cwd=folder)
    assert result(folder, "averaged")["losses"] == result(folder, "plain")["losses"]
    averaged, plain = (
        load_file(export(folder, run, "--engine", "vllm", "--dtype", "float32") / "model.safetensors")
        for run in ("averaged", "plain")
    )
    for name in ("d2t", "t2d"):
        assert torch.equal(averaged[name], plain[name])
    assert not torch.equal(averaged["lm_head.weight"], plain["lm_head.weight"])
    options = ("evaluate.checkpoint=runs/averaged/checkpoints/step-000006.ckpt", "data.num_eval_samples=2")
    shown = python("-m", "lightning_dataflow", "evaluate", *SETTINGS, *options, cwd=folder).stdout
    assert "acceptance_length" in shown


def test_averaging_that_discards_the_training_is_refused(folder):
    swa = ("+callbacks.swa._target_=lightning.pytorch.callbacks.StochasticWeightAveraging", "+callbacks.swa.swa_lrs=0.001")
    shown = python(TRAIN, *SETTINGS, *swa, "run_name=swa", cwd=folder, status=1).stderr
    (error,) = (line for line in shown.splitlines() if line.startswith("error: "))
    assert error.endswith("Use Lightning's EMAWeightAveraging or WeightAveraging")
