"""Folders read back: ours to the bit, and those of others, whose names and fields differ."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.folder import write_draft
from lightning_dataflow.export.serve import check_draft
from lightning_dataflow.strategies.published.engines import resolve_engine
from lightning_dataflow.strategies.published.reading import read_draft
from tests.targets import LLAMA3
from tests.unit.export.drafts import NETWORKS, describe, make_draft

SPECULATORS = {"speculators_model_type": "eagle3", "lightning_dataflow": None, "norm_before_residual": False}
DRAFTING = {"proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": "3"}]}
NESTED = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}


def served():
    """Every draft with every format that can express it."""
    for engine, form in (("sglang", "plain"), ("vllm", "plain"), ("vllm", "speculators")):
        for kind in NETWORKS:
            try:
                check_draft(describe(kind), resolve_engine(engine, form))
            except UserError:
                continue
            yield engine, form, kind


@pytest.fixture
def folder(tmp_path):
    """folder(kind, engine, format) → one that was just written."""

    def write(kind="eagle3", engine="sglang", form="plain"):
        return write_draft(
            tmp_path / "draft",
            resolve_engine(engine, form),
            describe(kind, dtype="float32"),
            make_draft(kind).state_dict(),
        )

    return write


def edit(folder, **fields):
    """Set fields of `config.json`; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(("engine", "form", "kind"), list(served()))
def test_what_was_written_is_read(folder, kind, engine, form):
    chosen = resolve_engine(engine, form)
    read = read_draft(folder(kind, engine, form))
    assert (read.strategy, read.format, read.layer_ids) == (kind.partition("-")[0], chosen.name, (1, 3, 4))
    sizes = asdict(NETWORKS[kind])
    given = ("hidden_size", "vocab_size", "num_aux_layers", "train_embeddings")
    expected = {name: value for name, value in sizes.items() if name not in given}
    if "layer_types" in expected:
        expected["layer_types"] = list(expected["layer_types"])
    assert read.network == expected
    assert (read.hidden_size, read.vocab_size, read.target_hidden_size) == (16, 40, 16)
    assert read.num_target_layers == (None if read.strategy == "eagle3" else 8)
    assert read.num_draft_tokens == (5 if form == "speculators" else None)
    state = make_draft(kind).state_dict()
    if kind == "eagle3-whole":
        del state["d2t"], state["t2d"]
    assert read.tensors().keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(read.tensors()[name], tensor), name


@pytest.mark.parametrize(
    ("engine", "form", "ids"),
    [("sglang", "plain", (1, 3, 4)), ("vllm", "plain", (1, 3, 4)), ("vllm", "speculators", (1, 3, 4))],
)
def test_folders_of_others_do_not_name_their_format(folder, engine, form, ids):
    assert read_draft(edit(folder("eagle3", engine, form), lightning_dataflow=None)).layer_ids == ids


def test_names_of_others(folder, tmp_path):
    """A prefix, the layer's other name, no t2d, rotary tables, and several files."""
    draft = folder()
    tensors = load_file(draft / "model.safetensors")
    renamed = {
        f"model.{name.replace('midlayer.', 'layers.0.')}": tensor for name, tensor in tensors.items() if name != "t2d"
    }
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (draft / "model.safetensors").unlink()
    for index, name in enumerate(sorted(renamed)):
        save_file({name: renamed[name]}, draft / f"model-{index:05d}.safetensors")
    read = read_draft(draft)
    assert read.tensors().keys() == tensors.keys() - {"t2d"}
    assert torch.equal(read.tensors()["midlayer.mlp.up_proj.weight"], tensors["midlayer.mlp.up_proj.weight"])


def test_fields_of_others(folder):
    """Of older transformers, and what follows from others."""
    read = read_draft(
        edit(
            folder(),
            rope_parameters=None,
            rope_theta=1e6,
            draft_vocab_size=None,
            eagle_config=None,
            num_key_value_heads=None,
        )
    )
    assert (read.network["rope_theta"], read.network["draft_vocab_size"], read.layer_ids) == (1e6, 40, None)
    assert (read.network["num_key_value_heads"], read.network["head_dim"]) == (4, 8)
    assert (read.num_target_layers, read.num_draft_tokens) == (None, None)
    older = edit(
        read.folder, rope_scaling={"type": "default", "partial_rotary_factor": 1, "rope_theta": 2e6, "factor": None}
    )
    assert read_draft(older).network["rope_theta"] == 2e6


def test_vllm_has_another_name_for_the_window(folder):
    draft = folder("dflash-sliding")
    config = json.loads((draft / "config.json").read_text())
    named = config["dflash_config"] | {"swa_window_size": 4}
    assert read_draft(edit(draft, dflash_config=named)).network["sliding_window"] == 4
    assert read_draft(edit(draft, sliding_window=None)).network["sliding_window"] == 4
    with pytest.raises(UserError, match=r"swa_window_size=512 with sliding_window=4096"):
        read_draft(edit(draft, sliding_window=4096, dflash_config=named | {"swa_window_size": 512}))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("eagle3", {"norm_before_fc": True, "eagle_config": {}}, "norm_before_fc=True is another network than is trained"),
        ("eagle3", {"norm_output": True}, "norm_output=True is another network"),
        ("eagle3", {"attention_bias": True}, "attention_bias=True"),
        ("eagle3", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("eagle3", {"num_hidden_layers": 2}, "num_hidden_layers=2 is another network than is trained here"),
        ("eagle3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters has rope_type='llama3'"),
        ("eagle3", {"rope_parameters": LLAMA3 | {"factor": -1}}, "rope_parameters has factor=-1"),
        ("eagle3", {"rope_parameters": LLAMA3 | {"mscale": 1.0}}, r"rope_parameters has mscale=1\.0"),
        ("eagle3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters has rope_type='dynamic'"),
        ("eagle3", {"rms_norm_eps": 7.0}, r"rms_norm_eps=7\.0 is no number above 0 and up to 1"),
        ("eagle3", {"hidden_size": 10**9}, "hidden_size=1000000000 is no size"),
        ("eagle3", {"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta=inf is no number above 1"),
        ("eagle3", {"rope_parameters": "linear"}, "rope_parameters='linear' is no object"),
        ("eagle3", {"rope_scaling": {"type": "yarn"}}, "rope_scaling has type='yarn': only default rotary embeddings"),
        ("eagle3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters has partial_rotary_factor=0.5"),
        ("dflash", {"rope_parameters": {"rope_type": "default", "rope_dim": 4}}, "rope_parameters has rope_dim=4"),
        ("dflash", {"rope_parameters": NESTED}, "rope_parameters has full_attention={'rope_type': 'yarn'"),
        ("eagle3", {"hidden_size": "16"}, "hidden_size='16' is no size"),
        ("eagle3", {"hidden_size": None}, "hidden_size=None is no size"),
        ("eagle3", {"rms_norm_eps": "small"}, "rms_norm_eps='small' is no number"),
        ("eagle3", {"eagle_config": [1]}, "eagle_config must be an object"),
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": "1,2"}}, "'1,2' is no list of layers"),
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [True, 2]}}, r"\[True, 2\] is no list of layers"),
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 2]}}, r"\[-1, 2\] is no list of layers"),
        ("eagle3", {"speculators_model_type": ["eagle3"], "lightning_dataflow": None}, "drafts of speculators_model_type="),
        ("eagle3", {"architectures": ["LlamaForCausalLM"]}, "holds a LlamaForCausalLM, not a draft that can be trained on"),
        ("eagle3", {"architectures": None}, r"names no class of a draft \(architectures\)"),
        ("eagle3", {"num_attention_heads": 0}, "num_attention_heads=0 is no size"),
        ("dflash", {"layer_types": "full_attention"}, "layer_types='full_attention' is no list"),
        ("eagle3", SPECULATORS | {"speculators_config": DRAFTING}, "speculative_tokens='3' is no size"),
        ("eagle3", SPECULATORS | {"speculators_config": "greedy"}, "cannot read .*config.json"),
        ("eagle3", {"speculators_model_type": "medusa", "lightning_dataflow": None}, "speculators_model_type=medusa"),
        ("eagle3", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("dflash", {"dflash_config": {"projector_type": "other"}}, "projector_type=other is another network"),
        ("dflash", {"dflash_config": {"mask_token_id": 39}}, "does not say which layers of the target"),
        ("dflash", {"draft_vocab_size": 12}, "draft_vocab_size=12, a block draft here uses the target's"),
        ("dflash", {"is_causal": True}, "is_causal=True with layer_types"),
        ("dflash-sliding", {"swa_window_size": 3}, "swa_window_size=3 with sliding_window=4: engines differ in which"),
    ],
)  # fmt: skip
def test_another_network_than_ours_is_refused_by_name(folder, kind, fields, message):
    with pytest.raises(UserError, match=message) as raised:
        read_draft(edit(folder(kind), **fields))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("older", [False, True])
def test_scaled_rotary_embeddings(folder, older):
    name = "rope_scaling" if older else "rope_parameters"
    fields = {"rope_parameters": None, "rope_theta": 5e5, name: LLAMA3}
    network = read_draft(edit(folder(), **fields)).network
    assert (network["rope_theta"], network["rope_scaling"]) == (5e5, LLAMA3)


def test_what_is_no_draft(folder, tmp_path):
    with pytest.raises(UserError, match=r"no draft in .*nowhere \(config.json is missing\)"):
        read_draft(tmp_path / "nowhere")
    draft = folder()
    (draft / "mask_embedding.pt").touch()
    with pytest.raises(UserError, match=r"mask_embedding.pt: a mask token with an embedding of its own"):
        read_draft(draft)
    (draft / "mask_embedding.pt").unlink()
    (draft / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        read_draft(draft)
    (draft / "model.safetensors").rename(draft / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"no safetensors in .*: convert other files first, they would have to be unpickled"
    ):
        read_draft(draft)
    for text in ("{", "[]"):
        (draft / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot read .*config\.json"):
            read_draft(draft)
