"""What objectives must not do on a GPU: wait for it, or follow the default dtype, which is bfloat16 under `bf16-true`."""

import pytest
import torch

from lightning_dataflow.contracts import StepContext
from lightning_dataflow.strategies.blocks.blocks import cut_blocks
from lightning_dataflow.strategies.blocks.labels import BlockLabels
from lightning_dataflow.strategies.dflash.objective import DFlashObjective
from lightning_dataflow.strategies.domino.objective import DominoObjective
from lightning_dataflow.strategies.eagle3.objective import Eagle3Objective, supervised_positions

VOCAB, HIDDEN, LENGTH, BLOCK, STEPS = 11, 6, 9, 4, 3
MASK = torch.ones(2, LENGTH)
HALF_WAY = StepContext(global_step=5, total_steps=20)


def eagle3(draw, lk_loss=None):
    rows, target_ids = supervised_positions(MASK), torch.tensor([1, 2, 5, 7])
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, target_ids, True)
    hidden, lm_head = draw(STEPS, 2, LENGTH, HIDDEN), draw(len(target_ids), HIDDEN)
    last, head = draw(2, LENGTH, HIDDEN), draw(VOCAB, HIDDEN)
    return lambda: Eagle3Objective(lk_loss=lk_loss)(
        hidden, lm_head, last_hidden_state=last, target_head=head, target_ids=target_ids, t2d=t2d, rows=rows
    )


def blocks_and_rows():
    blocks = cut_blocks(torch.ones(2, LENGTH, dtype=torch.int64), MASK, [torch.tensor([0, 3]), torch.tensor([5])], BLOCK)
    return blocks, BlockLabels.of(blocks).rows


def dflash(draw, **options):
    blocks, rows = blocks_and_rows()
    hidden, head = draw(3, BLOCK, HIDDEN), draw(VOCAB, HIDDEN)
    return lambda: DFlashObjective(**options)(hidden, head, blocks, rows=rows)


def domino(draw):
    blocks, rows = blocks_and_rows()
    hidden, features, weight, head = draw(3, BLOCK, HIDDEN), draw(3, BLOCK, 2), draw(VOCAB, 2), draw(VOCAB, HIDDEN)
    return lambda: DominoObjective()(hidden, features, weight, head, blocks, HALF_WAY, rows)


OBJECTIVES = {
    "eagle3": eagle3,
    "eagle3 alpha": lambda draw: eagle3(draw, "alpha"),
    "eagle3 lambda": lambda draw: eagle3(draw, "lambda"),
    "dflash": dflash,
    "dflash dpace": lambda draw: dflash(draw, dpace=True),
    "domino": domino,
}


def make(name, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()

    return OBJECTIVES[name](draw)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_waits_for_no_device(monkeypatch, name):
    def refuse(*_, **__):
        raise AssertionError("on a GPU this waits for the device")

    score = make(name, torch.float32)
    for owner, waits in ((torch, ("tensor", "nonzero")), (torch.Tensor, ("item", "tolist", "nonzero", "__bool__", "cpu"))):
        for attribute in waits:
            monkeypatch.setattr(owner, attribute, refuse)
    score().loss.numerator.backward()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_default_dtype_does_not_matter(name):
    exact = make(name, torch.float32)()
    score = make(name, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = score()
        rounded.loss.numerator.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert rounded.loss.denominator.dtype == torch.float32
    assert rounded.loss.denominator == pytest.approx(exact.loss.denominator)
    assert rounded.loss.numerator.item() == pytest.approx(exact.loss.numerator.item(), rel=0.03)
