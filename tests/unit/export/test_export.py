"""Checkpoints of real fits become folders, and folders become drafts again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import lightning_dataflow as ldf
from lightning_dataflow import export_draft
from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.checkpoint import load_module
from tests.unit.export.checkpoints import KINDS, export


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_to_the_bit_and_one_step_on(kind, checkpoint, fit, target_path, tmp_path):
    folder = export(checkpoint(kind), tmp_path / "draft", kind)
    original = load_module(checkpoint(kind))
    cls, options = KINDS[kind]
    settings = {name: options[name] for name in ("num_steps", "num_anchors", "train_embeddings") if name in options}
    imported = cls(str(target_path), init_from=str(folder), lr=1e-2, **settings)
    imported.load_frozen_target(torch.device("cpu"))
    imported.load_start()
    assert imported.draft.config == original.draft.config
    state = original.draft.state_dict()
    assert imported.draft.state_dict().keys() == state.keys()
    for name, tensor in imported.draft.state_dict().items():
        assert torch.equal(tensor, state[name]), name

    fit(original.train(), 1)
    again = cls(str(target_path), init_from=str(folder), lr=1e-2, **settings)
    fit(again, 1)
    assert float(again.step_losses[0]) == pytest.approx(float(original.step_losses[-1]), rel=1e-6, abs=0)
    assert float(again.step_losses[0]) > 0


@pytest.mark.parametrize("kind", ["eagle3", "domino"])
def test_bfloat16_is_rounded_once(kind, checkpoint, target_path, tmp_path):
    """An export of what was imported is the same file."""
    first = export(checkpoint(kind), tmp_path / "first", dtype="bfloat16")
    second = export(first, tmp_path / "second", dtype="bfloat16", target=str(target_path))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    assert "which does not say" in (second / "README.md").read_text()


def test_one_engine_s_folder_becomes_another_s(checkpoint, target_path, tmp_path):
    sglang = export(checkpoint(), tmp_path / "sglang")
    direct = export(checkpoint(), tmp_path / "direct", engine="vllm", format="speculators")
    through = export(sglang, tmp_path / "through", engine="vllm", format="speculators", target=str(target_path))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (direct, through)]
    for config in configs:  # how far it was unrolled is no part of SGLang's folder
        del config["speculators_config"]["proposal_methods"]
    assert configs[0] == configs[1]
    tensors = [load_file(folder / "model.safetensors") for folder in (direct, through)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])


def test_a_run_gives_its_newest_complete_checkpoint(checkpoint, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(checkpoint().parent.parent, run)
    newest = run / "checkpoints" / "step=2.ckpt"
    torch.save({}, run / "checkpoints" / "step=3.ckpt")
    acceptance = [
        {"step": step, "acceptance_length": 1.5, "acceptance_per_position": [0.4, 0.1], "num_prompts": 7} for step in (2, 4)
    ]
    result = {"acceptance": acceptance, "precision": "bf16-mixed", "settings": {"data": {"path": "chat.jsonl"}}}
    (run / "result.json").write_text(json.dumps(result | {"versions": {"torch": "9.9"}}))
    card = (export(run, tmp_path / "draft") / "README.md").read_text()
    assert "step=3.ckpt is skipped, it is not a complete checkpoint" in caplog.text
    for told in (
        'base_model: "target"',
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {tmp_path / 'draft'}",
        "| optimizer steps | 2 |",
        "| samples | 4 |",
        "| data | chat.jsonl |",
        "| precision | bf16-mixed |",
        "| draft vocabulary | 64 of 320 |",
        "| lr | 0.01 |",
        "Trained with torch 9.9.",
        "| 2 | 7 | not recorded | not recorded | 2 | 1.500 | 0.400, 0.100 |",
    ):
        assert told in card, told
    assert "| 4 | 7 |" not in card, "measured after this checkpoint"
    assert "## Acceptance\n\nNot measured." in (export(checkpoint(), tmp_path / "other") / "README.md").read_text()
    for path in (newest, newest.with_name("step=1.ckpt")):
        path.with_name(path.name + ".complete").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint in .*: name the one to export"):
        export(run, tmp_path / "third")
    export(newest, tmp_path / "third")


def test_the_card_says_how_it_was_measured(checkpoint, tmp_path):
    """By each measurement's own word, or by the settings of the run."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint().parent.parent, run)
    measured = {"acceptance_length": 1.5, "acceptance_per_position": [0.4, 0.1], "num_prompts": 7}
    history = [{"step": 0, "temperature": 0.0, "max_new_tokens": 64, **measured}, {"step": 2, **measured}]
    settings = {"evaluate": {"temperature": 0.7, "max_new_tokens": 32}}
    (run / "result.json").write_text(json.dumps({"acceptance": history, "settings": settings}))
    card = (export(run, tmp_path / "draft") / "README.md").read_text()
    assert "| step | prompts | temperature | new tokens, at most | drafted at a time |" in card
    assert "| 0 | 7 | 0.0 | 64 | 2 | 1.500 | 0.400, 0.100 |\n| 2 | 7 | 0.7 | 32 | 2 | 1.500 |" in card


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_a_speculators_folder_keeps_how_many_tokens_it_drafts(kind, checkpoint, target_path, tmp_path):
    """Also where that is neither the default of a training here, nor a block."""
    published = export(checkpoint(kind), tmp_path / "published", engine="vllm", format="speculators")
    config = json.loads((published / "config.json").read_text())
    config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 3
    (published / "config.json").write_text(json.dumps(config))
    again = export(published, tmp_path / "again", engine="vllm", format="speculators", target=str(target_path))
    assert json.loads((again / "config.json").read_text())["speculators_config"] == config["speculators_config"]
    card = (export(published, tmp_path / "sglang", target=str(target_path)) / "README.md").read_text()
    assert "It drafts up to 3 tokens at a time" in card and "--speculative-num-draft-tokens 4\n" in card
    assert "nor how many tokens" not in card


def test_tokenizer_files_on_request(checkpoint, target_path, tmp_path):
    folder = export(checkpoint(), tmp_path / "draft", tokenizer=True)
    assert (folder / "tokenizer.json").read_bytes() == (target_path / "tokenizer.json").read_bytes()
    assert not (export(checkpoint(), tmp_path / "without") / "tokenizer.json").exists()


def test_it_is_public(checkpoint, tmp_path):
    assert ldf.export_draft is export_draft
    assert export_draft(checkpoint(), tmp_path / "draft", engine="sglang") == tmp_path / "draft"
