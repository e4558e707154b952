"""A training that starts from an exported folder, and what it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dataflow import DFlashModule, DominoModule, Eagle3Module
from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.checkpoint import load_module
from tests.unit.export.checkpoints import KINDS, export, saver

DEEPER = {"block_size": 6, "num_target_layers": 30, "target_layer_ids": [1, 2, 3, 4, 5], "mask_token_id": 259}


def test_a_resumed_warm_start_does_not_need_the_folder(checkpoint, fit, target_path, tmp_path):
    folder = export(checkpoint("dflash"), tmp_path / "draft")
    warm = DFlashModule(str(target_path), init_from=str(folder), num_anchors=12)
    fit(warm, callbacks=[saver(tmp_path / "warm")])
    shutil.rmtree(folder)
    loaded = load_module(tmp_path / "warm" / "step=2.ckpt")
    assert loaded.draft.config == warm.draft.config
    assert torch.equal(loaded.draft.fc.weight, warm.draft.fc.weight)


def change(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "fields", "options", "message"),
    [
        ("eagle3", {"hidden_size": 32, "target_hidden_size": 32}, {}, "another target (hidden size 32, "),
        ("eagle3", {"target_hidden_size": 64, "hidden_size": 32}, {}, "another target (hidden size of the draft 32, "),
        ("eagle3", {"vocab_size": 400}, {}, "another target (vocabulary 400, "),
        ("dflash", {"dflash_config": DEEPER}, {}, "another target (number of layers 30, "),
        (
            "eagle3",
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 8]}},
            {},
            "another target (highest layer 8, ",
        ),
        ("dflash", {}, {"cls": Eagle3Module}, "holds a draft of dflash, not one of eagle3: set strategy=dflash"),
        ("eagle3", {}, {"layer_ids": [1, 2, 4]}, "these settings say [1, 2, 4]: set 'strategy.layer_ids=[1, 3, 4]'"),
        ("eagle3", {}, {"draft_vocab_size": 32}, "(draft_vocab_size=32): set strategy.draft_vocab_size=64"),
        ("dflash", {}, {"num_layers": 5, "block_size": 16}, "set strategy.num_layers=1 strategy.block_size=6"),
        ("dflash", {}, {"cls": DominoModule}, "holds a draft of dflash, not one of domino"),
        ("dflash", {}, {"layer_types": ["full_attention"] * 2}, "set strategy.layer_types=[]"),
        ("sliding", {}, {"layer_types": ["full_attention"]}, "set strategy.layer_types=['sliding_attention']"),
    ],
)
def test_a_draft_of_another_training_is_refused_before_it_is_read(
    kind, fields, options, message, checkpoint, target_path, tmp_path
):
    folder = export(checkpoint(kind), tmp_path / "draft", engine="sglang", format="plain")
    change(folder, **fields)
    cls = options.pop("cls", KINDS[kind][0])
    with pytest.raises(UserError) as raised:
        cls(str(target_path), init_from=str(folder), **options)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("layer_types", [None, [], ["full_attention"], ("full_attention",)])
def test_full_attention_may_be_spelt_out(layer_types, checkpoint, target_path, tmp_path):
    folder = export(checkpoint("dflash"), tmp_path / "draft")
    module = DFlashModule(str(target_path), init_from=str(folder), layer_types=layer_types)
    assert module.draft.config == load_module(checkpoint("dflash")).draft.config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("fc.weight"), "lacks fc.weight: it is not a whole eagle3 draft"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)[:7]], " and 3 more: it is not a whole"),
        (lambda tensors: tensors.pop("d2t"), "lacks d2t"),
        (
            lambda tensors: tensors["norm.weight"][3:4].fill_(math.nan),
            "norm.weight holds NaN or infinity, so the draft cannot be used: name another",
        ),
        (
            lambda tensors: tensors.update({"midlayer.self_attn.q_norm.weight": torch.ones(8)}),
            "has a place: it is another",
        ),
        (
            lambda tensors: tensors.update({"fc.weight": torch.ones(64, 64)}),
            "fc.weight is [64, 64], any eagle3 draft with its config.json has",
        ),
        (lambda tensors: tensors["d2t"].fill_(400), "d2t does not map 64 draft ids to as many of 320 target ids"),
        (lambda tensors: tensors["t2d"].fill_(True), "t2d names other tokens than d2t maps to"),
        (
            lambda tensors: tensors.update({"embed_tokens.weight": torch.ones(320, 64)}),
            "set strategy.train_embeddings=true",
        ),
    ],
)
def test_tensors_that_do_not_make_a_draft(edit, message, checkpoint, target_path, fit, tmp_path):
    folder = export(checkpoint(), tmp_path / "draft")
    change_tensors(folder, edit)
    with pytest.raises(UserError) as raised:
        fit(Eagle3Module(str(target_path), init_from=str(folder)), 1)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_folder_may_leave_to_the_target(checkpoint, target_path, target, tmp_path):
    """The embedding that everybody has, or a whole vocabulary's head and maps."""
    folder = export(checkpoint(), tmp_path / "draft")
    embedding = target.model.get_input_embeddings().weight.detach()
    change_tensors(folder, lambda tensors: tensors.update({"embed_tokens.weight": embedding.bfloat16()}))
    module = load_module(folder, target=str(target_path))
    assert not module.draft.config.train_embeddings
    change_tensors(folder, lambda tensors: tensors.update({"embed_tokens.weight": embedding + 1}))
    module = load_module(folder, target=str(target_path))
    assert torch.equal(module.draft.embed_tokens.weight, embedding + 1)

    whole = export(checkpoint("whole"), tmp_path / "whole", "whole")
    change_tensors(whole, lambda tensors: tensors.pop("lm_head.weight"))
    module = load_module(whole, target=str(target_path))
    assert torch.equal(module.draft.lm_head.weight, target.model.lm_head.weight)
    with pytest.raises(UserError, match="does not hold its target: name it"):
        load_module(whole)
