"""What flex attention needs on a GPU, as far as a CPU shows it."""

import pytest
import torch
from torch.nn.attention import flex_attention

from lightning_dataflow.strategies.blocks.attention import ContextKeys, _flex_block_attention, flex_block_mask
from lightning_dataflow.strategies.blocks.blocks import cut_blocks
from lightning_dataflow.strategies.common import flex
from lightning_dataflow.strategies.eagle3.attention import PackedRows, _flex_unrolled_attention, _unrolled_block_mask

CPU = torch.device("cpu")
CREATE_BLOCK_MASK = flex_attention.create_block_mask


def blocks_of(length, counts):
    torch.manual_seed(0)
    anchors = [torch.randperm(length - 1)[:count].sort().values for count in counts]
    return cut_blocks(torch.zeros(len(counts), length, dtype=torch.int64), torch.ones(len(counts), length), anchors, 16)


def block_mask(length, counts, window):
    return flex_block_mask(blocks_of(length, counts), (len(counts), length), 16, window)


# Shapes of one kind share a compilation, which takes seconds.
MASKS = {
    "blocks": [lambda s=s: block_mask(*s, None) for s in ((300, (20, 9)), (256, (30, 9)))],
    "blocks in a window": [lambda s=s: block_mask(*s, 40) for s in ((300, (20, 9)), (256, (30, 9)))],
    "unrolled": [lambda s=s: _unrolled_block_mask.__wrapped__(*s, CPU) for s in ((300, 3), (256, 7))],
}


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["blocks in a window", *(pytest.param(name, marks=pytest.mark.slow) for name in ("blocks", "unrolled"))]
)
def test_compiled_masks_are_the_eager_ones(monkeypatch, name):
    eager = [make() for make in MASKS[name]]
    compiled = flex.compiled(CREATE_BLOCK_MASK, dynamic=True)
    monkeypatch.setattr(flex_attention, "create_block_mask", compiled)
    for expected, make in zip(eager, MASKS[name], strict=True):
        found = make()
        for part in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            assert torch.equal(getattr(found, part), getattr(expected, part)), part


def test_the_unrolled_mask_is_compiled_on_cuda(monkeypatch):
    asked = []
    monkeypatch.setattr(flex, "compiled", lambda *how, **options: lambda *_, **__: asked.append((*how, options)))
    _unrolled_block_mask.__wrapped__(300, 3, torch.device("cuda"))
    assert asked == [(CREATE_BLOCK_MASK, {"dynamic": True})]


@pytest.mark.integration
def test_no_call_leaves_the_kernel_to_inductor(monkeypatch):
    real, options = flex_attention.flex_attention, []

    def record(*arguments, **named):
        options.append(named["kernel_options"])
        return real(*arguments, **named)

    monkeypatch.setattr(flex_attention, "flex_attention", record)
    blocks = blocks_of(40, (3,))
    query, keys = torch.randn(1, 4, 40, 16), [torch.randn(1, 2, 40, 16)] * 2
    of_blocks = ContextKeys(*keys, *[torch.randn(3, 2, 16, 16)] * 2)
    with torch.no_grad():
        _flex_unrolled_attention(query, keys, keys)
        _flex_unrolled_attention(query, keys, keys, PackedRows(torch.arange(40)[None]))
        _flex_block_attention(torch.randn(3, 4, 16, 16), of_blocks, blocks, None)
    assert options == [{"BACKEND": "TRITON"}] * 3
