"""Block attention against dense masks; the DFlash and Domino networks."""

import pytest
import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.blocks import attention as block_attention
from lightning_dataflow.strategies.blocks.attention import ContextKeys, _flex_block_attention
from lightning_dataflow.strategies.blocks.blocks import Span, cut_blocks
from lightning_dataflow.strategies.blocks.network import BlockConfig, BlockDraft
from lightning_dataflow.strategies.domino.network import DominoConfig, DominoDraft

LENGTH, BLOCK, VOCAB, HIDDEN = 40, 4, 50, 32
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "mask_token_id": 49,
    "num_aux_layers": 2,
    "block_size": BLOCK,
}
# More blocks than a chunk, one that starts the sample, one that hangs over its end; a sample without any; few anchors.
ANCHORS = [torch.tensor([0, 1, 3, 4, 5, 9, 11, 12, 17, 25, 30, 37]), torch.zeros(0, dtype=torch.int64), torch.tensor([8])]


# The same anchors, in samples of which the first two stand in one row.
PACKED = [Span(0, 0, 13), Span(0, 13, LENGTH), Span(1, 0, LENGTH), Span(2, 4, 20)]
PACKED_ANCHORS = [ANCHORS[0][:7], ANCHORS[0][9:-1] - 13, *ANCHORS[1:]]


def make_blocks(anchors=ANCHORS, samples=None):
    torch.manual_seed(0)
    return cut_blocks(torch.randint(VOCAB - 1, (3, LENGTH)), torch.ones(3, LENGTH), anchors, BLOCK, samples)


def dense(query, keys, blocks, window):
    """Every block against all keys of its sample and all blocks."""
    groups = query.shape[1] // keys.block_key.shape[1]
    rows = []
    for index, (row, start, anchor) in enumerate(zip(*(x.tolist() for x in blocks[:3]), strict=True)):
        key = torch.cat((keys.context_key[row], keys.block_key[index]), 1).repeat_interleave(groups, 0)
        value = torch.cat((keys.context_value[row], keys.block_value[index]), 1).repeat_interleave(groups, 0)
        position, context = anchor + torch.arange(BLOCK)[:, None], torch.arange(LENGTH)
        of_context = (context >= start) & (context < anchor)
        visible = torch.cat((of_context.expand(BLOCK, -1), torch.ones(BLOCK, BLOCK, dtype=torch.bool)), 1)
        if window is not None:
            at = torch.cat((context, position[:, 0]))
            visible = visible & (at <= position) & (at >= position - (window - 1))
        scores = (query[index] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
        rows.append(torch.softmax(scores, -1) @ value)
    return torch.stack(rows)


def attention_inputs(blocks, dtype=torch.float64):
    num_blocks = len(blocks.anchor)
    shapes = [(num_blocks, 4, BLOCK, 8)] + [(3, 2, LENGTH, 8)] * 2 + [(num_blocks, 2, BLOCK, 8)] * 2
    query, *keys = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return query, ContextKeys(*keys)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_block_attention_and_its_gradients(monkeypatch, window, chunk, packed):
    monkeypatch.setattr(block_attention, "CHUNK_BLOCKS", chunk)
    blocks = make_blocks(PACKED_ANCHORS, PACKED) if packed else make_blocks()
    query, keys = attention_inputs(blocks)
    out, expected = block_attention.block_attention(query, keys, blocks, window), dense(query, keys, blocks, window)
    assert torch.allclose(out, expected, atol=1e-12)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (query, *keys))
    for one, other in zip(found, torch.autograd.grad((expected * weights).sum(), (query, *keys)), strict=True):
        assert torch.allclose(one, other, atol=1e-11)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_the_flex_mask_is_the_same_attention(window, packed):
    blocks = make_blocks(PACKED_ANCHORS, PACKED) if packed else make_blocks()
    query, keys = attention_inputs(blocks, torch.float32)
    with torch.no_grad():
        found = _flex_block_attention(query, keys, blocks, window)
        assert torch.allclose(found, dense(query, keys, blocks, window), atol=1e-5)


def test_block_attention_in_bfloat16():
    blocks = make_blocks()
    query, keys = attention_inputs(blocks, torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in (query, *keys)]
    out = block_attention.block_attention(half[0], ContextKeys(*half[1:]), blocks)
    expected = dense(query, keys, blocks, None)
    assert torch.allclose(out.float(), expected, atol=0.05)
    found = torch.autograd.grad(out.float().sum(), half)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), (query, *keys)), strict=True):
        assert torch.allclose(one.float(), other, atol=0.1 * float(other.abs().max()) + 0.02)


WINDOWED = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 5}


def make_draft(kind, **options):
    torch.manual_seed(1)
    if kind == "dflash":
        return BlockDraft(BlockConfig(**SIZES | options))
    draft = DominoDraft(DominoConfig(**SIZES | {"gru_hidden_dim": 6, "emb_dim": 5} | options))
    torch.nn.init.normal_(draft.correction_weight)
    return draft


def hidden_states(hidden):
    """For a draft without a head, in place of an objective."""
    return hidden


@pytest.mark.parametrize("options", [{}, WINDOWED])
def test_padding_and_other_samples_change_nothing(options):
    draft, embedding = make_draft("dflash", **options), torch.randn(VOCAB, HIDDEN)
    ids, aux, mask = torch.randint(49, (2, 20)), torch.randn(2, 20, 2 * HIDDEN), torch.ones(2, 20)
    mask[1, 13:] = 0
    anchors = [torch.tensor([2, 7]), torch.tensor([0, 5, 11])]
    together = draft(aux, embedding, cut_blocks(ids, mask, anchors, BLOCK), hidden_states)
    alone = draft(aux[1:, :13], embedding, cut_blocks(ids[1:, :13], mask[1:, :13], anchors[1:], BLOCK), hidden_states)
    assert torch.allclose(together[2:], alone, atol=1e-5)


@pytest.mark.parametrize("options", [{}, WINDOWED])
@pytest.mark.parametrize("anchor", [1, 9])
def test_decoding_is_a_block_of_training(options, anchor):
    draft, embedding = make_draft("dflash", **options), torch.randn(VOCAB, HIDDEN)
    ids, aux = torch.randint(49, (1, 20)), torch.randn(1, 20, 2 * HIDDEN)
    blocks = cut_blocks(ids, torch.ones(1, 20), [torch.tensor([anchor])], BLOCK)
    caches = draft.new_caches()
    for start, stop in ((0, 1), (1, anchor)):
        if stop > start:
            draft.extend_context(aux[0, start:stop], caches)
    expected = draft(aux, embedding, blocks, hidden_states)[0]
    for _ in range(2):  # drafting leaves the context as it is
        assert torch.allclose(
            draft.decode(int(ids[0, anchor]), embedding, caches, draft.config.block_size), expected, atol=1e-5
        )
    assert caches[0].length == anchor


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
def test_dominos_correction_while_decoding_is_that_of_training(shift, prefix):
    """The correction of drafted token j depends on the real tokens before it, and on d at its offset."""
    draft, embedding = make_draft("domino", shift_label=shift, pure_draft_prefix_len=prefix), torch.randn(VOCAB, HIDDEN)
    ids, aux = torch.randint(49, (1, 20)), torch.randn(1, 20, 2 * HIDDEN)
    blocks = cut_blocks(ids, torch.ones(1, 20), [torch.tensor([9])], BLOCK)
    hidden, features, weight = draft(aux, embedding, blocks, lambda *scored: scored)
    state, first = None, 0 if shift else 1
    for index in range(BLOCK - first):
        before = int(ids[0, 9 + index])
        added, state = draft.decode_correction(index, hidden[0, index + first], before, embedding, state)
        expected = features[0, index + first] @ weight.T
        if index < prefix:
            assert added is None
            assert expected.abs().max() == 0
        else:
            assert torch.allclose(added, expected, atol=1e-5)
            assert expected.abs().max() > 0.01


def test_autocast_leaves_dominos_gru_alone():
    draft, embedding = make_draft("domino"), torch.randn(VOCAB, HIDDEN)
    tokens = torch.randint(VOCAB, (3, BLOCK + 1))
    expected, (_, state) = (
        draft.prefix_states(tokens, embedding),
        draft.decode_correction(1, embedding[0], 5, embedding, None),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, (_, cast) = (
            draft.prefix_states(tokens, embedding),
            draft.decode_correction(1, embedding[0], 5, embedding, None),
        )
    assert torch.equal(found, expected)
    assert torch.equal(cast, state)


def test_a_new_domino_draft_starts_as_dflash():
    torch.manual_seed(1)
    assert DominoDraft(DominoConfig(**SIZES)).correction_weight.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "choose 2 or more"),
        ({"num_layers": 0}, "at least one layer"),
        ({"mask_token_id": 50}, "choose 0 to 49"),
        ({"layer_types": ("full_attention",)}, "for each of the 2 layers"),
        ({"layer_types": ("full", "full")}, "name full_attention or sliding_attention"),
        ({"sliding_window": 4}, "goes with sliding_attention layers"),
        ({"layer_types": ("sliding_attention",) * 2}, "sliding_window=None"),
        ({"gru_hidden_dim": 0}, "at least 1"),
        ({"pure_draft_prefix_len": 3}, "choose 0 to 2"),
        ({"pure_draft_prefix_len": 4, "shift_label": True}, "choose 0 to 3"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        DominoConfig(**SIZES | options)
