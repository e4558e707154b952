"""Targets that scale, cap or shift their logits: every loss and drafter uses the logits that the target would give."""

import pytest
import torch
from torch.nn import functional as F

from lightning_dataflow.strategies.blocks.drafter import BlockDrafter
from lightning_dataflow.strategies.blocks.network import BlockConfig, BlockDraft
from lightning_dataflow.strategies.common import tiles
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.strategies.dflash.objective import frozen_head_cross_entropy
from lightning_dataflow.strategies.domino.objective import DominoObjective
from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from lightning_dataflow.strategies.eagle3.objective import Eagle3Objective, supervised_positions
from lightning_dataflow.targets.logits import LogitsTransform
from tests.targets import write_target
from tests.unit.strategies.test_block_objectives import NOW, losses, make, same_gradients

VOCAB, HIDDEN = 11, 6
BIAS = torch.linspace(-2, 2, VOCAB)
TRANSFORMS = {
    "scale": LogitsTransform(scale=0.25),
    "cap": LogitsTransform(cap=1.5),
    "bias": LogitsTransform(bias=BIAS),
    "all": LogitsTransform(scale=3.0, cap=2.0, bias=BIAS),
}


def plain(transform, products):
    """The definition."""
    logits = transform.scale * (products + (0 if transform.bias is None else transform.bias))
    return logits if transform.cap is None else transform.cap * torch.tanh(logits / transform.cap)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_dflash(name, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ROWS", 3)
    torch.manual_seed(0)
    hidden, head = torch.randn(8, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    labels, weight = torch.randint(0, VOCAB, (8,)), torch.rand(8)
    cross_entropy, correct = frozen_head_cross_entropy(hidden, head, labels, TRANSFORMS[name])
    logits = plain(TRANSFORMS[name], hidden @ head.T)
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(cross_entropy, expected, atol=1e-5)
    assert torch.equal(correct, logits.argmax(-1) == labels)
    same_gradients((cross_entropy * weight).sum(), (expected * weight).sum(), (hidden,))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_domino_after_its_correction(name):
    blocks, hidden, features, weight, head = make()
    options = {"gamma": 3.0, "lambda_decay_ratio": 0.5}
    sums = DominoObjective(**options)(hidden, features, weight, head, blocks, NOW, transform=TRANSFORMS[name])
    base = hidden @ head.T
    share = DominoObjective(**options).base_share(NOW)
    of_base, _ = losses(plain(TRANSFORMS[name], base), 0, 3.0)
    of_final, _ = losses(plain(TRANSFORMS[name], base + features @ weight.T), 0, 3.0)
    expected = torch.lerp(of_final, of_base, share)
    assert torch.allclose(sums.loss.numerator, expected, rtol=1e-5)
    same_gradients(sums.loss.numerator, expected, (hidden, features, weight))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_eagle3_s_teacher(name):
    """A teacher whose head gives the transformed logits: states of one-hot rows read the head's columns."""
    torch.manual_seed(0)
    hidden, lm_head = torch.randn(2, 2, 8, HIDDEN, requires_grad=True), torch.randn(5, HIDDEN, requires_grad=True)
    last, head = torch.randn(2, 8, HIDDEN), torch.randn(VOCAB, HIDDEN)
    given = {"target_ids": torch.tensor([0, 2, 3, 7, 9]), "rows": supervised_positions(torch.ones(2, 8))}
    given["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, given["target_ids"], True)
    teacher = {"last_hidden_state": last, "target_head": head, "transform": TRANSFORMS[name]}
    sums = Eagle3Objective()(hidden, lm_head, **teacher, **given)
    logits = plain(TRANSFORMS[name], last @ head.T)
    expected = Eagle3Objective()(hidden, lm_head, last_hidden_state=logits, target_head=torch.eye(VOCAB), **given)
    assert torch.allclose(sums.loss.numerator, expected.loss.numerator, rtol=1e-5)
    for metric, value in expected.metrics.items():
        assert torch.allclose(sums.metrics[metric].numerator, value.numerator, rtol=1e-5), metric
    same_gradients(sums.loss.numerator, expected.loss.numerator, (hidden, lm_head))


def test_a_drafter_samples_from_the_target_s_logits():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    config = BlockConfig(**sizes, num_key_value_heads=1, vocab_size=VOCAB, mask_token_id=10, num_aux_layers=1, block_size=4)
    draft, target = BlockDraft(config).eval(), FrozenTarget(torch.randn(VOCAB, 16), torch.randn(VOCAB, 16))
    transform, proposals = LogitsTransform(scale=3.0, bias=BIAS), []
    for target.transform in (None, transform):
        drafter = BlockDrafter(draft, target, num_draft_tokens=3)
        drafter.observe([1, 2], torch.ones(2, 16))
        proposals.append(drafter.propose(1.0, torch.Generator().manual_seed(0)).probabilities)
    products = torch.log(proposals[0])  # up to a constant, which does not matter without a cap
    assert torch.allclose(proposals[1], torch.softmax(plain(transform, products), -1), atol=1e-4)


def test_moving_a_target_moves_its_bias():
    target = FrozenTarget(torch.ones(3, 2), torch.ones(3, 2), LogitsTransform(bias=torch.ones(3)))
    moved = target.to(torch.device("meta"))
    assert moved.transform.bias.device.type == moved.head.device.type == "meta"


def test_a_draft_s_head_starts_from_the_scaled_head(tmp_path):
    module = Eagle3Module(str(write_target("granite", tmp_path)))
    module.load_frozen_target(torch.device("cpu"))
    module.initialise_draft(None)
    assert torch.equal(module.draft.lm_head.weight, module.frozen_target.head / 8)
