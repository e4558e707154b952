import shutil
from dataclasses import replace

import pytest
import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.checkpoint import _rebuild
from lightning_dataflow.strategies.common.layers import SwiGLU, rotary_tables
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.strategies.eagle3.attention import (
    PackedRows,
    _flex_unrolled_attention,
    causal_attention,
    unrolled_attention,
)
from lightning_dataflow.strategies.eagle3.draft_vocab import most_frequent
from lightning_dataflow.strategies.eagle3.network import DraftCache, Eagle3Config, Eagle3Draft
from lightning_dataflow.targets.info import read_target_info
from tests.targets import write_target


def dense_unrolled(query, keys, values):
    """Every score at once, with key and value heads repeated."""
    groups = query.shape[1] // keys[0].shape[1]
    key, value = torch.cat(keys, 2).repeat_interleave(groups, 1), torch.cat(values, 2).repeat_interleave(groups, 1)
    length = query.shape[2]
    own = torch.eye(length, dtype=torch.bool)
    visible = torch.cat([torch.ones(length, length, dtype=torch.bool).tril(), *[own] * (len(keys) - 1)], dim=1)
    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1) @ value


def attention_inputs(num_steps, heads=6, kv_heads=2, length=9, dtype=torch.float64):
    torch.manual_seed(0)
    query = torch.randn(2, heads, length, 8, dtype=dtype, requires_grad=True)
    keys = [torch.randn(2, kv_heads, length, 8, dtype=dtype, requires_grad=True) for _ in range(num_steps)]
    values = [torch.randn(2, kv_heads, length, 8, dtype=dtype, requires_grad=True) for _ in range(num_steps)]
    return query, keys, values


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("heads", [2, 6])
def test_unrolled_attention_and_its_gradients(num_steps, heads):
    query, keys, values = attention_inputs(num_steps, heads=heads)
    inputs = [query, *keys, *values]
    out, expected = unrolled_attention(query, keys, values), dense_unrolled(query, keys, values)
    assert torch.allclose(out, expected, atol=1e-12)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-11)


POSITION = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
"""Three samples in one row, one in the other."""


def test_samples_of_a_packed_row_do_not_see_each_other():
    query, keys, values = attention_inputs(3)
    inputs, rows = [query, *keys, *values], PackedRows(POSITION)
    out = unrolled_attention(query, keys, values, rows)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), inputs)
    assert [(row.start, span.start, span.stop) for row, _, span in rows.parts] == [
        (0, 0, 4),
        (0, 4, 6),
        (0, 6, 9),
        (1, 0, 9),
    ]
    for part in rows.parts:
        alone = [x[part].detach().requires_grad_() for x in inputs]
        expected = dense_unrolled(alone[0], alone[1:4], alone[4:])
        assert torch.allclose(out[part], expected, atol=1e-12)
        grads = torch.autograd.grad((expected * weights[part]).sum(), alone)
        for one, other in zip(found, grads, strict=True):
            assert torch.allclose(one[part], other, atol=1e-11)


@pytest.mark.integration
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_packed_flex_mask_is_the_same_attention(num_steps):
    query, keys, values = attention_inputs(num_steps, heads=4, kv_heads=2, length=128, dtype=torch.float32)
    query, keys, values = query.detach(), [x.detach() for x in keys], [x.detach() for x in values]
    three = torch.cat((torch.arange(50), torch.arange(7), torch.arange(71)))
    position = torch.stack((three, torch.arange(128)))
    with torch.no_grad():
        found = _flex_unrolled_attention(query, keys, values, PackedRows(position))
        assert torch.allclose(found, unrolled_attention(query, keys, values, PackedRows(position)), atol=1e-5)


def test_unrolled_attention_in_bfloat16():
    query, keys, values = attention_inputs(3, dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in (query, *keys, *values)]
    out, expected = unrolled_attention(half[0], half[1:4], half[4:]), dense_unrolled(query, keys, values)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected, atol=0.03)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((out * weights).sum(), half)
    for one, other in zip(found, torch.autograd.grad((expected * weights).sum(), (query, *keys, *values)), strict=True):
        assert torch.allclose(one.float(), other, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_flex_mask_is_the_same_attention(num_steps):
    query, keys, values = attention_inputs(num_steps, heads=4, kv_heads=2, length=128, dtype=torch.float32)
    query, keys, values = query.detach(), [x.detach() for x in keys], [x.detach() for x in values]
    with torch.no_grad():
        found = _flex_unrolled_attention(query, keys, values)
        assert torch.allclose(found, dense_unrolled(query, keys, values), atol=1e-5)


def test_causal_attention_of_the_last_positions():
    query, (key,), (value,) = attention_inputs(1)
    whole = causal_attention(query, key, value)
    assert torch.allclose(causal_attention(query[:, :, -3:], key, value), whole[:, :, -3:])
    assert torch.allclose(causal_attention(query[:, :, -1:], key, value), whole[:, :, -1:])


def test_swiglu_gradients():
    mlp = SwiGLU(4, 6).double()
    assert torch.autograd.gradcheck(mlp, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


SMALL = {
    "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    "vocab_size": 8, "draft_vocab_size": 8,
}  # fmt: skip


def test_draft_vocabulary():
    counts = torch.tensor([0, 5, 1, 5, 0, 9])
    assert most_frequent(counts, 3).tolist() == [1, 3, 5]
    assert most_frequent(counts, 4).tolist() == [1, 2, 3, 5]
    assert most_frequent(counts, 5).tolist() == [0, 1, 2, 3, 5]  # ties: the lower id
    draft = Eagle3Draft(Eagle3Config(**SMALL | {"vocab_size": 6, "draft_vocab_size": 3}))
    draft.set_target_ids(torch.tensor([1, 3, 5]))
    assert draft.d2t.tolist() == [1, 2, 3]
    assert draft.t2d.tolist() == [False, True, False, True, False, True]
    assert draft.target_ids.tolist() == [1, 3, 5]


@pytest.mark.parametrize("size", [0, 7])
def test_a_draft_vocabulary_of_an_impossible_size(size):
    with pytest.raises(UserError, match="choose 1 to 6"):
        Eagle3Config(**SMALL | {"vocab_size": 6, "draft_vocab_size": size})


@pytest.mark.parametrize("name", ["plain", "llama3", "yarn", "linear"])
def test_rotary_tables_are_the_target_s(tmp_path, name):
    """Far beyond the length that the target was first trained on, too."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    info, positions = read_target_info(write_target(name, tmp_path)), torch.tensor([[0, 1, 31, 100, 255]])
    config = Eagle3Config(**SMALL | {"head_dim": 8, "rope_theta": info.rope_theta, "rope_scaling": info.rope_scaling})
    expected = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))(torch.zeros(1), positions)
    for ours, theirs in zip(rotary_tables(positions, config), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_checkpoint_from_before_scaled_rotary_embeddings_keeps_its_own(tmp_path):
    info = read_target_info(write_target("yarn", tmp_path))
    saved = {
        "strategy": "eagle3",
        "hyper_parameters": {"target": str(tmp_path)},
        "target_model_version": info.model_version,
        "identity": {"rope_theta": info.rope_theta},
    }
    assert _rebuild(tmp_path, saved, None).draft.config.rope_scaling is None
    saved["identity"]["rope_scaling"] = info.rope_scaling
    assert _rebuild(tmp_path, saved, None).draft.config.rope_scaling == info.rope_scaling


def test_frozen_target_reads_two_tensors(target, target_path):
    frozen = FrozenTarget.of(read_target_info(target_path), torch.float32)
    assert torch.equal(frozen.embedding, target.model.get_input_embeddings().weight)
    assert torch.equal(frozen.head, target.model.get_output_embeddings().weight)


@pytest.mark.parametrize(("architecture", "tied"), [("GPTNeoX", False), ("GPT2", True), ("OPT", True)])
def test_names_of_other_architectures(tmp_path, architecture, tied):
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = getattr(transformers, f"{architecture}Config")(**sizes, tie_word_embeddings=tied)
    if architecture == "OPT":
        config.word_embed_proj_dim, config.ffn_dim = 16, 32
    model = getattr(transformers, f"{architecture}ForCausalLM" if architecture != "GPT2" else "GPT2LMHeadModel")(config)
    model.save_pretrained(tmp_path)
    frozen = FrozenTarget.of(read_target_info(tmp_path), torch.float32)
    assert torch.equal(frozen.embedding, model.get_input_embeddings().weight)
    assert torch.equal(frozen.head, model.get_output_embeddings().weight)


def test_tied_embeddings_stay_one_tensor(tmp_path, target_path):
    from safetensors.torch import save_file

    shutil.copy(target_path / "config.json", tmp_path)
    info = replace(read_target_info(target_path), path=str(tmp_path), tie_word_embeddings=True)
    with pytest.raises(UserError, match="no safetensors in"):
        FrozenTarget.of(info, torch.float32)
    save_file({"model.other.weight": torch.randn(4, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no token embedding"):
        FrozenTarget.of(info, torch.float32)
    save_file({"model.embed_tokens.weight": torch.randn(4, 2)}, tmp_path / "model.safetensors")
    frozen = FrozenTarget.of(info, torch.bfloat16).to(torch.device("cpu"))
    assert frozen.head is frozen.embedding
    with pytest.raises(UserError, match="no head in"):
        FrozenTarget.of(replace(info, tie_word_embeddings=False), torch.float32)
    tensors = {"model.embed_tokens.weight": torch.randn(4, 2), "lm_head.bias": torch.randn(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(FrozenTarget.of(info, torch.float32).transform.bias, tensors["lm_head.bias"])


def test_decoding_is_step_0_of_training():
    """One causal pass over a sequence gives what the first unrolled step gives."""
    torch.manual_seed(0)
    config = Eagle3Config(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
        draft_vocab_size=20,
    )
    draft, embedding = Eagle3Draft(config), torch.randn(50, 32)
    ids, aux = torch.randint(50, (1, 12)), torch.randn(1, 12, 96)
    steps = draft(ids, aux, embedding, 2, lambda hidden, lm_head: hidden @ lm_head.T)
    cache = DraftCache()
    hidden, logits = draft.decode(ids[:, :7], draft.fc(aux[:, :7]), embedding, cache)
    assert torch.allclose(logits, steps[0, 0, 6], atol=1e-5)
    _, logits = draft.decode(ids[:, 7:], draft.fc(aux[:, 7:]), embedding, cache)
    assert torch.allclose(logits, steps[0, 0, 11], atol=1e-5)
    # Unrolled step 1 at position 6: fed with token 7's embedding and the draft's own h.
    cache.crop(7)
    _, logits = draft.decode(ids[:, 7:8], hidden[:, -1:], embedding, cache)
    assert torch.allclose(logits, steps[1, 0, 6], atol=1e-5)


def test_heads_that_do_not_divide():
    with pytest.raises(UserError, match="not a multiple"):
        Eagle3Config(**SMALL | {"num_attention_heads": 3})
