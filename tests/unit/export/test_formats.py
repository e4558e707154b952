"""What each engine is told: the fields it reads, layers by its own count, and what it would serve wrongly is refused."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.folder import write_draft
from lightning_dataflow.export.serve import check_draft, serve_command
from lightning_dataflow.strategies.published.engines import resolve_engine
from tests.unit.export.drafts import NETWORKS, describe, make_draft

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "max_position_embeddings": 512,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0, "beta_slow": 1.0}
QWEN3 = {name: value for name, value in LLAMA.items() if name != "mlp_bias"} | {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
}
PLAIN_EAGLE3 = LLAMA | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": 12,
    "target_hidden_size": 16,
    "num_aux_hidden_states": 3,
    "eagle_config": {
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
        "norm_before_fc": False,
    },
    "dtype": "bfloat16",
}
PLAIN_DFLASH = QWEN3 | {
    "architectures": ["DFlashDraftModel"],
    "dflash_config": {"block_size": 6, "num_target_layers": 8, "target_layer_ids": [1, 3, 4], "mask_token_id": 39},
    "dtype": "bfloat16",
}


def config(kind: str, engine: str, form: str = "plain", **fields):
    chosen, draft = resolve_engine(engine, form), describe(kind, **fields)
    return check_draft(draft, chosen).fields(draft, chosen) | {"dtype": draft.dtype}


def test_sglang():
    assert config("eagle3", "sglang") == PLAIN_EAGLE3
    assert config("dflash", "sglang") == PLAIN_DFLASH
    domino = {
        "projector_type": "domino",
        "shift_label": False,
        "pure_draft_prefix_len": 1,
        "gru_hidden_dim": 10,
        "emb_dim": 6,
    }
    assert config("domino", "sglang") == PLAIN_DFLASH | {"dflash_config": PLAIN_DFLASH["dflash_config"] | domino}
    assert config("domino-shifted", "sglang")["dflash_config"]["shift_label"] is True


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_scaled_rotary_embeddings(kind):
    network = replace(NETWORKS[kind], rope_scaling=YARN)
    for engine, form in (("sglang", "plain"), ("vllm", "plain"), ("vllm", "speculators")):
        fields = config(kind, engine, form, network=network)
        assert fields.get("transformer_layer_config", fields)["rope_parameters"] == YARN | {"rope_theta": 5e5}


def test_sliding_windows_are_given_as_transformers_wants_them():
    sliding = config("dflash-sliding", "sglang")
    assert sliding["layer_types"] == ["sliding_attention"] * 2
    assert (sliding["use_sliding_window"], sliding["sliding_window"], sliding["max_window_layers"]) == (True, 4, 0)


def test_vllm_counts_the_layers_of_eagle3_from_one():
    ids = [2, 4, 5]
    eagle = PLAIN_EAGLE3["eagle_config"] | {"eagle_aux_hidden_state_layer_ids": ids}
    expected = {"eagle_config": eagle, "eagle_aux_hidden_state_layer_ids": ids, "norm_before_residual": False}
    assert config("eagle3", "vllm") == PLAIN_EAGLE3 | expected
    assert config("dflash", "vllm") == PLAIN_DFLASH


def test_speculators():
    common = {
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "models/tiny", "architectures": ["LlamaForCausalLM"]},
        },
        "target_hidden_size": 16,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    assert config("eagle3", "vllm", "speculators") == common | {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": LLAMA | {"num_aux_hidden_states": 3},
        "draft_vocab_size": 12,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "norm_before_residual": False,
        "norm_before_fc": False,
    }
    one = replace(NETWORKS["eagle3"], num_aux_layers=1)
    of_one = config("eagle3", "vllm", "speculators", layer_ids=(7,), network=one)
    assert of_one["eagle_aux_hidden_state_layer_ids"] == [8]
    assert of_one["transformer_layer_config"]["num_aux_hidden_states"] == 1
    dflash = config("dflash", "vllm", "speculators")
    assert dflash.pop("speculators_config")["algorithm"] == "dflash"
    assert dflash == {name: value for name, value in common.items() if name != "speculators_config"} | {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": QWEN3,
        "draft_vocab_size": 40,
        "aux_hidden_state_layer_ids": [2, 4, 5],
        "block_size": 6,
        "mask_token_id": 39,
        "num_target_layers": 8,
        "sample_from_anchor": False,
        "sliding_window_non_causal": True,
    }
    assert config("dflash-sliding", "vllm", "speculators")["sliding_window_non_causal"] is False


@pytest.mark.parametrize(
    ("kind", "engine", "form", "fields", "message"),
    [
        ("dflash", "sglang", "plain", {"head_bias": True}, "the head of models/tiny has a bias, which SGLang leaves out"),
        ("dflash", "vllm", "speculators", {"head_bias": True}, "has a bias, which vLLM's speculators format leaves out"),
        ("domino", "vllm", "plain", {}, "vLLM does not serve domino drafts, only dflash, eagle3"),
        ("domino", "vllm", "speculators", {}, "vLLM's speculators format does not serve domino drafts"),
        ("eagle3-own-embedding", "sglang", "plain", {}, "SGLang gives every EAGLE3 draft the target's token embedding"),
        ("eagle3", "sglang", "plain", {"layer_ids": (3,)}, r"one target layer \(3\), it leaves out fc: export for vllm"),
        ("dflash", "sglang", "plain", {"layer_ids": (1, 7)}, r"does not capture the target's last layer \(7\)"),
        ("domino-corrected", "sglang", "plain", {}, "with pure_draft_prefix_len=1 only, this one has 0: train with"),
        ("dflash-mixed", "vllm", "speculators", {}, "one causality for all layers.*export with --format plain, which vLLM"),
    ],
)
def test_what_an_engine_would_not_serve_as_trained_is_refused(kind, engine, form, fields, message):
    with pytest.raises(UserError, match=message) as raised:
        config(kind, engine, form, **fields)
    assert "\n" not in str(raised.value)


def test_vllm_serves_what_sglang_does_not():
    config("eagle3-own-embedding", "vllm")
    config("eagle3", "vllm", layer_ids=(7,))
    config("dflash-mixed", "vllm")


@pytest.mark.parametrize(("engine", "form"), [("sglang", "plain"), ("vllm", "plain"), ("vllm", "speculators")])
def test_a_shell_reads_paths_in_serve_commands_as_they_are(engine, form):
    target, folder = "my models/it's tiny", "drafts/$(today)'s draft"
    command = serve_command(describe("eagle3", target=target), resolve_engine(engine, form), folder)
    read = subprocess.run(
        ["bash", "-c", f"set -- {command}; printf '%s\\n' \"$@\""], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if form == "speculators":
        assert read == ["vllm", "serve", folder]
    elif engine == "vllm":
        assert read[:3] == ["vllm", "serve", target]
        assert json.loads(read[-1]) == {"method": "eagle3", "model": folder, "num_speculative_tokens": 5}
    else:
        assert read[read.index("--model-path") + 1] == target
        assert read[read.index("--speculative-draft-model-path") + 1] == folder


def test_an_unknown_format_lists_what_there_is():
    with pytest.raises(UserError, match="available are sglang plain, vllm plain, vllm speculators"):
        resolve_engine("sglang", "speculators")


def test_names_shapes_and_dtypes(tmp_path):
    draft, form = make_draft("eagle3"), resolve_engine("sglang")
    write_draft(tmp_path / "out", form, describe("eagle3"), draft.state_dict())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} == {
        "fc.weight": ((16, 48), torch.bfloat16),
        "midlayer.input_layernorm.weight": ((16,), torch.bfloat16),
        "midlayer.hidden_norm.weight": ((16,), torch.bfloat16),
        "midlayer.post_attention_layernorm.weight": ((16,), torch.bfloat16),
        "midlayer.self_attn.q_proj.weight": ((32, 32), torch.bfloat16),
        "midlayer.self_attn.k_proj.weight": ((16, 32), torch.bfloat16),
        "midlayer.self_attn.v_proj.weight": ((16, 32), torch.bfloat16),
        "midlayer.self_attn.o_proj.weight": ((16, 32), torch.bfloat16),
        "midlayer.mlp.gate_proj.weight": ((24, 16), torch.bfloat16),
        "midlayer.mlp.up_proj.weight": ((24, 16), torch.bfloat16),
        "midlayer.mlp.down_proj.weight": ((16, 24), torch.bfloat16),
        "norm.weight": ((16,), torch.bfloat16),
        "lm_head.weight": ((12, 16), torch.bfloat16),
        "d2t": ((12,), torch.int64),
        "t2d": ((40,), torch.bool),
    }
    kept = torch.arange(12) + stored["d2t"]  # offsets
    assert stored["t2d"].nonzero().squeeze(-1).tolist() == kept.tolist()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_whole_vocabulary_needs_no_maps(tmp_path):
    draft, form = make_draft("eagle3-whole"), resolve_engine("vllm", "speculators")
    write_draft(tmp_path / "out", form, describe("eagle3-whole"), draft.state_dict())
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not {"d2t", "t2d"} & names
    assert {name for name in names if "layer" in name} == {name for name in names if name.startswith("layers.0.")}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    draft, form, spec = make_draft("dflash"), resolve_engine("vllm"), describe("dflash")
    with pytest.raises(FileNotFoundError):
        write_draft(tmp_path / "out", form, spec, draft.state_dict(), copies=[tmp_path / "nowhere"])
    assert list(tmp_path.iterdir()) == []
    write_draft(tmp_path / "out", form, spec, draft.state_dict())
    with pytest.raises(UserError, match="out exists: choose another folder"):
        write_draft(tmp_path / "out", form, spec, draft.state_dict())
    with pytest.raises(UserError, match="dtype=int8 is unknown: use bfloat16, float16, float32"):
        write_draft(tmp_path / "other", form, replace(spec, dtype="int8"), draft.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
