"""Targets of many architectures load, decode, and are found out where their logits are not the head's products."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.common.head_check import check_head
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.targets import HFTargetEngine, read_target_info
from lightning_dataflow.targets.batch import TargetBatch
from lightning_dataflow.targets.hf import TargetSession
from lightning_dataflow.targets.info import read_eos_token_ids
from tests.targets import LLAMA3, MODELS, YARN, write_target

IDS = [7, 5, 9, 33, 44, 3, 20, 21]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = write_target(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def engine(path, dtype="float32"):
    return HFTargetEngine(path, layer_ids=[0, 2], dtype=dtype, device="cpu")


def edited(folder, tmp_path, **fields):
    """A copy with other fields in its config.json."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_head_and_last_state_give_the_target_s_logits(folder, name):
    target = engine(folder(name))
    check_head(target)
    frozen = FrozenTarget.of(target.info, torch.float32)
    last, theirs = target.logits_of(IDS)
    ours = last @ frozen.head.T
    if frozen.transform is not None:
        frozen.transform.apply_(ours)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert (frozen.transform is not None) == (name in ("gemma2", "granite", "cohere", "phi"))
    assert torch.equal(frozen.embedding, target.model.get_input_embeddings().weight)
    captured = target.capture([IDS, IDS[:3]])
    assert torch.allclose(captured[0]["last_hidden_state"], last, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "phi"])
def test_the_check_allows_for_rounding(folder, name):
    check_head(engine(folder(name), "bfloat16"))


@pytest.mark.parametrize("name", ["gpt_oss", "bloom"])
def test_eager_attention_where_it_is_needed(folder, name, caplog):
    with caplog.at_level(logging.INFO):
        target = engine(folder(name))
    assert "does not support attention=sdpa, using eager" in caplog.text
    logits = target.logits_of(IDS)[1]
    session = TargetSession(target)
    session.extend(IDS[:5])
    assert torch.allclose(session.extend(IDS[5:])[0], logits[5:], atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_next", "bloom", "qwen2_5_vl"])
def test_tokens_that_are_taken_back_leave_no_trace(folder, name):
    """Recurrent states sum up all tokens; a cache alone cannot take one back."""
    target = engine(folder(name))
    session = TargetSession(target)
    session.extend(IDS[:4])
    session.crop(4)
    session.extend([1, 2, 3])
    session.crop(5)
    session.extend([6])
    session.crop(4)
    assert torch.allclose(session.extend(IDS[4:])[0], target.logits_of(IDS)[1][4:], atol=1e-4)


def test_several_sequences_at_a_time_with_eager_attention(folder):
    """It adds the mask to the scores: a boolean one would hide nothing."""
    target = HFTargetEngine(folder("plain"), layer_ids=[0], dtype="float32", device="cpu", attention="eager")
    batch = TargetBatch(target, [IDS[:5], IDS[:2]], room=3)
    for (logits, _), ids in zip(batch.extend([IDS[5:], IDS[2:5]]), (IDS, IDS[:5]), strict=True):
        assert torch.allclose(logits, target.logits_of(ids)[1][-3:], atol=1e-5)
    with pytest.raises(UserError, match="a BloomForCausalLM does not take"):
        TargetBatch(engine(folder("bloom")), [IDS[:5], IDS[:2]], room=3)


def test_a_scale_of_any_name_is_found(folder, monkeypatch):
    target = engine(folder("plain"))
    forward = target.model.forward

    def scaled(**arguments):
        output = forward(**arguments)
        output.logits = output.logits * 1.25 + 0.5
        return output

    monkeypatch.setattr(target.model, "forward", scaled)
    with pytest.raises(UserError, match=r"changes its logits .* they are 1\.\d+ times as large") as raised:
        check_head(target)
    assert "\n" not in str(raised.value)


def test_another_head_or_embedding_than_the_model_s_is_found(folder):
    target = engine(folder("plain"))
    with torch.no_grad():
        target.model.get_input_embeddings().weight += 1
    with pytest.raises(UserError, match=r"the token embedding of .* is not the one in its files"):
        check_head(target)


def test_a_target_of_nan_is_left_to_the_checks_of_features(folder, caplog):
    target = engine(folder("plain"))
    with torch.no_grad():
        target.model.get_input_embeddings().weight.fill_(torch.nan)
    check_head(target)
    assert "not compared with its head" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3", (5e5, LLAMA3)),
        ("yarn", (1e4, YARN | {"beta_fast": 32.0, "beta_slow": 1.0})),
        ("linear", (1e4, {"rope_type": "linear", "factor": 4.0})),
        ("dynamic", (1e4, None)),
        ("qwen2_5_vl", (1e6, None)),
        ("gpt_oss", None),
    ],
)
def test_rotary_embeddings(folder, name, expected):
    info = read_target_info(folder(name))
    if expected is None:
        assert info.rope_scaling["rope_type"] == "yarn"
    else:
        assert (info.rope_theta, info.rope_scaling) == expected


def test_rotary_embeddings_that_differ_between_layers(folder, tmp_path):
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    info = read_target_info(edited(folder("plain"), tmp_path, model_type="gemma3_text", rope_parameters=nested, head_dim=8))
    assert (info.rope_theta, info.rope_scaling) == (1e6, {"rope_type": "linear", "factor": 8.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 is no size"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000 is no size, expected a whole number from 1 to"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 is no size"),
        ({"rms_norm_eps": 1e9}, r"rms_norm_eps=1000000000\.0 is no number above 0 and up to 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is no number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, r"rope_theta=-5\.0 is no number above 1"),
        ({"model_type": "granite", "logits_scaling": float("inf")}, "logits_scaling=inf is no positive number"),
        ({"model_type": "nothing"}, "cannot read .*config.json"),
        ({"num_attention_heads": "many"}, "cannot read .*config.json|num_attention_heads='many' is no size"),
    ],
)
def test_absurd_sizes(folder, tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as raised:
        read_target_info(edited(folder("plain"), tmp_path, **fields))
    assert "\n" not in str(raised.value)


def test_what_is_no_language_model(folder, tmp_path):
    path = edited(folder("plain"), tmp_path, model_type="distilbert")
    with pytest.raises(UserError, match="holds a distilbert model, which is not a causal language model"):
        FrozenTarget.of(read_target_info(path), torch.float32)


def split(path):
    """Two files and an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _cut(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _cut_to_nothing(path):
    (path / "model.safetensors").write_bytes(b"\x10")


def _lose_a_part(path):
    split(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def _pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _remove(path):
    (path / "model.safetensors").unlink()


def _link_to_nothing(path):
    (path / "model.safetensors").unlink()
    (path / "weights.safetensors").symlink_to("gone.safetensors")


def _leave_the_folder(path):
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../model-1.safetensors"}})
    )


def _write_nonsense(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("[]")


def _nest_deeply(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"model.safetensors is damaged or cut short \(.+\): fetch the file again"),
        (_cut_to_nothing, "model.safetensors is damaged or cut short"),
        (_lose_a_part, "index.json names model-00002-of-00002.safetensors, which the folder does not have: fetch what"),
        (_pickle, "has pytorch_model.bin but no safetensors"),
        (_remove, "no safetensors in .*: fetch the target's weights"),
        (_link_to_nothing, r"cannot read .*weights.safetensors: No such file"),
        (_leave_the_folder, "names '../model-1.safetensors', which is no file of its folder"),
        (_write_nonsense, "cannot read .*index.json"),
        (_nest_deeply, "cannot read .*index.json"),
    ],
)
def test_damaged_folders(folder, tmp_path, damage, message):
    path = edited(folder("plain"), tmp_path)
    damage(path)
    with pytest.raises(UserError, match=message) as raised:
        read_target_info(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", "5", '{"eos_token_id": "x"}', '{"eos_token_id": 5.5}', "[" * 100_000, "\xff"])
def test_a_damaged_generation_config_is_one_line(folder, tmp_path, text):
    path = edited(folder("plain"), tmp_path)
    (path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*generation_config\.json: ") as raised:
        read_eos_token_ids(path)
    assert "\n" not in str(raised.value)


def test_an_index_beside_the_one_file_that_transformers_loads_is_not_read(folder, tmp_path):
    path = edited(folder("plain"), tmp_path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    check_head(engine(path))


def test_several_files(folder, tmp_path):
    path = edited(folder("plain"), tmp_path)
    split(path)
    check_head(engine(path))


def test_tensors_that_the_files_lack_are_not_made_up(folder, tmp_path):
    path = edited(folder("plain"), tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 of the model's tensors \(model.layers.1.mlp.up_proj.weight is one\)"):
        engine(path)
