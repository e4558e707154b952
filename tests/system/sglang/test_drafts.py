"""SGLang's own draft classes load our folders, write every parameter, use every tensor, and compute what we train."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dataflow import DFlashModule, DominoModule, Eagle3Module
from lightning_dataflow.export.export import describe
from lightning_dataflow.export.folder import write_draft
from lightning_dataflow.strategies.common.cache import DraftCache
from lightning_dataflow.strategies.eagle3.draft_vocab import most_frequent
from lightning_dataflow.strategies.published.engines import resolve_engine
from tests.processes import ROOT
from tests.sglang.environment import VARIABLES, sglang_python

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NUM_TOKENS = 23
SMALL = {"num_layers": 2, "block_size": 6}
UNLIKE = {"rope_theta": 3e5, "rms_norm_eps": 0.1, "head_dim": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
PREFIX = {"gru_hidden_dim": 12, "emb_dim": 8, "pure_draft_prefix_len": 1}
KINDS = {
    "eagle3": (Eagle3Module, {"draft_vocab_size": 96}),
    "whole": (Eagle3Module, {"intermediate_size": 96}),
    "unlike": (Eagle3Module, {"network": {**UNLIKE, "draft_vocab_size": 64}}),
    "five-layers": (Eagle3Module, {"draft_vocab_size": 96, "layer_ids": [0, 1, 3, 4, 6]}),
    "dflash": (DFlashModule, SMALL),
    "dflash-unlike": (DFlashModule, SMALL | {"network": UNLIKE}),
    "sliding": (DFlashModule, SMALL | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}),
    "mixed": (DFlashModule, SMALL | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}),
    "domino": (DominoModule, SMALL | PREFIX),
    "shifted": (DominoModule, SMALL | PREFIX | {"shift_label": True}),
}


def make_module(kind, target_path):
    """Every weight random, the norms' too."""
    cls, options = KINDS[kind]
    module = cls(str(target_path), **options)
    module.load_frozen_target(torch.device("cpu"))
    torch.manual_seed(1)
    for parameter in module.draft.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    if cls is Eagle3Module and (size := module.draft.config.draft_vocab_size) < 320:
        module.draft.set_target_ids(most_frequent(torch.randint(0, 9, (320,)), size))
    return module.eval()


@pytest.fixture(scope="module")
def cases(target_path, tmp_path_factory):
    """Modules by kind, what they ran on, and the folder where SGLang left its reports and outputs."""
    python, folder = sglang_python(), tmp_path_factory.mktemp("drafts")
    modules, form = {}, resolve_engine("sglang")
    for kind in KINDS:
        modules[kind] = module = make_module(kind, target_path)
        tensors = module.draft.state_dict()
        write_draft(folder / kind / "draft", form, describe(module, dtype="float32"), tensors)
        inputs = {
            "aux": torch.randn(NUM_TOKENS, len(module.layer_ids) * 64),
            "input_ids": torch.randint(0, 256, (NUM_TOKENS,)),
            "anchor": torch.tensor(7),
            "embedding": module.frozen_target.embedding,
            "head": module.frozen_target.head.clone(),
        }
        save_file(inputs, folder / kind / "inputs.safetensors")
    command = [str(python), str(ROOT / "tests/sglang/load_drafts.py"), str(target_path), str(folder)]
    result = subprocess.run(command, env=VARIABLES, capture_output=True, text=True, timeout=800, cwd=folder)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return modules, folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_written_and_every_tensor_used(cases, kind):
    modules, folder = cases
    report = json.loads((folder / kind / "report.json").read_text())
    stored = load_file(folder / kind / "draft" / "model.safetensors")
    assert report["class"] == ("LlamaForCausalLMEagle3" if "lm_head.weight" in stored else "DFlashDraftModel")
    assert report["untouched"] == []
    assert report["used"].keys() == stored.keys()
    maps = {"d2t", "t2d"} & stored.keys()  # SGLang makes its own map of the first, and needs no second
    for name, tensor in stored.items():
        written = report["used"][name]
        padding = -len(tensor) % 64 * 64 if name == "lm_head.weight" else 0  # rows of zeros
        assert written == (0 if name in maps else tensor.numel() + padding), name
    if maps:
        assert report["hot_token_id"] == modules[kind].draft.target_ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_the_layers_and_sizes_that_were_trained(cases, kind):
    modules, folder = cases
    module, report = modules[kind], json.loads((folder / kind / "report.json").read_text())
    assert report["layer_ids"] == list(module.layer_ids)
    if not isinstance(module, Eagle3Module):
        config = module.draft.config
        assert [report[name] for name in ("num_target_layers", "block_size", "mask_token_id")] == [
            module.target_info.num_layers,
            config.block_size,
            config.mask_token_id,
        ]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_computes_what_is_trained(cases, kind):
    modules, folder = cases
    module = modules[kind]
    draft, target = module.draft, module.frozen_target
    inputs, outputs = (load_file(folder / kind / f"{name}.safetensors") for name in ("inputs", "outputs"))
    if isinstance(module, Eagle3Module):
        states = draft.fc(inputs["aux"])[None]
        hidden, _ = draft.decode(inputs["input_ids"][None], states, target.embedding, DraftCache())
        logits = draft.lm_head(draft.norm(hidden[0]))
        torch.testing.assert_close(outputs["logits"], logits, atol=1e-4, rtol=1e-4)
        hidden = hidden[0]
    else:
        caches = draft.new_caches()
        draft.extend_context(inputs["aux"], caches)
        hidden = draft.decode(7, target.embedding, caches, draft.config.block_size)
    assert hidden.std() > 0.1
    torch.testing.assert_close(outputs["hidden"], hidden, atol=1e-4, rtol=1e-4)
    if isinstance(module, DominoModule):
        assert outputs["tokens"].tolist() == rollout(module, hidden)
        assert len(set(outputs["tokens"].tolist())) > 1


def rollout(module, hidden):
    """The greedy tokens of one block, one by one."""
    draft, target = module.draft, module.frozen_target
    tokens, state, first = [7], None, module.draft.config.first_offset
    for index in range(draft.config.block_size - 1):
        logits = target.head @ hidden[first + index]
        correction, state = draft.decode_correction(index, hidden[first + index], tokens[-1], target.embedding, state)
        tokens.append(int((logits if correction is None else logits + correction).argmax()))
    return tokens[1:]
