"""DFlash's and Domino's losses against their definitions, one offset at a time, on hand-made sequences."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_dataflow.contracts import StepContext
from lightning_dataflow.strategies.blocks.blocks import cut_blocks
from lightning_dataflow.strategies.common import tiles
from lightning_dataflow.strategies.dflash.objective import DFlashObjective
from lightning_dataflow.strategies.domino.objective import DominoObjective

VOCAB, HIDDEN, RANK, BLOCK = 11, 6, 4, 5
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 0, 0, 0]])  # the second sample has 5 tokens
MASK = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0]])
ANCHORS = [torch.tensor([1, 2, 6]), torch.tensor([2])]
ENDS = (8, 5)
NOW = StepContext(global_step=3, total_steps=20)  # λ = 0.7


def make(anchors=ANCHORS):
    torch.manual_seed(0)
    blocks = cut_blocks(IDS, MASK, anchors, BLOCK)
    hidden = torch.randn(len(blocks.anchor), BLOCK, HIDDEN, requires_grad=True)
    features = torch.randn(len(blocks.anchor), BLOCK, RANK, requires_grad=True)
    weight, head = torch.randn(VOCAB, RANK, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    return blocks, hidden, features, weight, head


def supervised_offsets(shift):
    """(block, offset, label) of all that counts, from the definition: the label of offset k is x_{a+k}, or x_{a+1+k}."""
    block = 0
    for sample, anchors in enumerate(ANCHORS):
        for anchor in anchors.tolist():
            for offset in range(BLOCK):
                position = anchor + offset + shift
                if (offset or shift) and position < ENDS[sample] and MASK[sample, position]:
                    yield block, offset, int(IDS[sample, position])
            block += 1


def expected_acceptance(logits, shift):
    """1 + right supervised offsets before the first wrong one, averaged over blocks."""
    runs, stopped = dict.fromkeys(range(len(logits)), 1), set()
    for block, offset, label in supervised_offsets(shift):
        if int(logits[block, offset].argmax()) != label:
            stopped.add(block)
        runs[block] += block not in stopped
    return sum(runs.values()) / len(runs)


def losses(logits, shift, gamma):
    """(Σ w·CE, Σ w)."""
    total, weights = torch.zeros(()), 0.0
    for block, offset, label in supervised_offsets(shift):
        weight = math.exp(-(offset - (0 if shift else 1)) / gamma)
        total = total + weight * F.cross_entropy(logits[block, offset], torch.tensor(label))
        weights += weight
    return total, weights


def same_gradients(found, expected, inputs):
    found, expected = torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_which_offsets_are_supervised():
    assert [(b, k, label) for b, k, label in supervised_offsets(0)] == [
        (0, 1, 4), (0, 2, 1), (0, 4, 9), (1, 1, 1), (1, 3, 9), (1, 4, 2), (2, 1, 6), (3, 1, 8), (3, 2, 2),
    ]  # fmt: skip


def test_dflash_by_the_definition():
    blocks, hidden, _, _, head = make()
    sums = DFlashObjective(gamma=3.0)(hidden, head, blocks)
    total, weights = losses(hidden @ head.T, 0, 3.0)
    assert torch.allclose(sums.loss.numerator, total, rtol=1e-5)
    assert sums.loss.denominator.item() == pytest.approx(weights)
    accuracy, length = sums.metrics["accuracy"], sums.metrics["acceptance_length"]
    right = [int((head @ hidden[b, k]).argmax()) == label for b, k, label in supervised_offsets(0)]
    assert (accuracy.numerator.item(), accuracy.denominator.item()) == (sum(right), len(right))
    assert sums.metrics["accuracy_per_position"].denominator.tolist() == [4, 2, 1, 2]
    assert (length.numerator / length.denominator).item() == pytest.approx(expected_acceptance(hidden @ head.T, 0))
    same_gradients(sums.loss.numerator, total, (hidden,))


def test_acceptance_skips_what_is_unsupervised():
    blocks, head = make()[0], torch.eye(VOCAB)
    states = F.one_hot(blocks.tokens[:, :BLOCK], VOCAB).float()
    sums = DFlashObjective()(states, head, blocks)
    assert (sums.metrics["acceptance_length"].numerator, sums.metrics["acceptance_length"].denominator) == (
        4 + 4 + 2 + 3,
        4,
    )
    states[0, 3] = 0  # not supervised: x_4
    states[1, 3] = 0
    sums = DFlashObjective()(states, head, blocks)
    assert sums.metrics["acceptance_length"].numerator == 4 + 2 + 2 + 3


def test_dpace_by_the_definition():
    blocks, hidden, _, _, head = make()
    logits, total = hidden @ head.T, torch.zeros(())
    for block in range(len(hidden)):
        here = [(offset, label) for b, offset, label in supervised_offsets(0) if b == block]
        losses = {offset: F.cross_entropy(logits[block, offset], torch.tensor(label)) for offset, label in here}
        product, products = 1.0, {}
        for offset in losses:  # s = 1 at the offsets between them
            product *= 0.7 * math.exp(-losses[offset].item()) + 0.3
            products[offset] = product
        for offset, loss in losses.items():
            total = total + loss * sum(value for other, value in products.items() if other >= offset)
    sums = DFlashObjective(dpace=True, dpace_alpha=0.3)(hidden, head, blocks)
    assert torch.allclose(sums.loss.numerator, total, rtol=1e-5)
    assert sums.loss.denominator == 2  # samples, not blocks
    same_gradients(sums.loss.numerator, total, (hidden,))


@pytest.mark.parametrize("shift", [False, True])
def test_domino_by_the_definition(shift):
    blocks, hidden, features, weight, head = make()
    objective = DominoObjective(gamma=3.0, first_offset=1 - shift)
    sums = objective(hidden, features, weight, head, blocks, NOW)
    base = hidden @ head.T
    final = base + features @ weight.T
    (final_total, weights), (base_total, _) = losses(final, shift, 3.0), losses(base, shift, 3.0)
    total = 0.3 * final_total + 0.7 * base_total
    assert torch.allclose(sums.loss.numerator, total, rtol=1e-5)
    assert sums.loss.denominator.item() == pytest.approx(weights)
    means = {name: one.numerator / one.denominator for name, one in sums.metrics.items()}
    assert means["final_loss"].item() == pytest.approx(final_total.item() / weights, rel=1e-5)
    assert means["base_loss"].item() == pytest.approx(base_total.item() / weights, rel=1e-5)
    assert means["base_share"].item() == pytest.approx(0.7)
    assert means["acceptance_length"].item() == pytest.approx(expected_acceptance(final, shift))
    assert means["base_acceptance_length"].item() == pytest.approx(expected_acceptance(base, shift))
    same_gradients(sums.loss.numerator, total, (hidden, features, weight))


def test_the_schedule_of_the_base_loss():
    def share(step, total=100, **options):
        return DominoObjective(**options).base_share(StepContext(global_step=step, total_steps=total))

    assert [share(step) for step in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert share(3, total=None) == 0
    assert share(5, lambda_start=0.4, lambda_decay_ratio=0.1) == pytest.approx(0.2)
    assert share(0, lambda_start=3.0) == 1
    assert [share(step, total=1) for step in (0, 1)] == [1.0, 0.0]


@pytest.mark.parametrize("rows", [1, 3])
def test_tiles_do_not_matter(monkeypatch, rows):
    blocks, hidden, features, weight, head = make()

    def results():
        domino = DominoObjective()(hidden, features, weight, head, blocks, NOW).loss.numerator
        dflash = DFlashObjective(dpace=True)(hidden, head, blocks).loss.numerator
        return [dflash, domino, *torch.autograd.grad(dflash + domino, (hidden, features, weight))]

    whole = results()
    monkeypatch.setattr(tiles, "TILE_ROWS", rows)
    for one, other in zip(whole, results(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_without_anchors_there_is_one_block_that_weighs_nothing():
    blocks, hidden, features, weight, head = make([torch.zeros(0, dtype=torch.int64)] * 2)
    assert len(blocks.anchor) == 1
    for sums in (
        DFlashObjective()(hidden, head, blocks),
        DFlashObjective(dpace=True)(hidden, head, blocks),
        DominoObjective()(hidden, features, weight, head, blocks, NOW),
    ):
        assert sums.loss.numerator == sums.loss.denominator == 0
        assert sums.metrics["acceptance_length"].denominator == 0
        sums.loss.numerator.backward()
        assert hidden.grad.abs().max() == 0


def test_under_autocast_they_are_close():
    blocks, hidden, features, weight, head = make()

    def total():
        domino = DominoObjective()(hidden, features, weight, head, blocks, NOW).loss.numerator
        return domino + DFlashObjective()(hidden, head, blocks).loss.numerator

    exact = total()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = total()
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact) < 0.02 * exact
    rounded.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
