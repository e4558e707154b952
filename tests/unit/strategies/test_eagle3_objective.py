"""Alignment against the definition, on hand-made sequences; tiles; sums."""

import pytest
import torch
from torch.nn import functional as F

from lightning_dataflow.strategies.common import tiles
from lightning_dataflow.strategies.eagle3.objective import Eagle3Objective, supervised_positions

VOCAB, HIDDEN, STEPS = 11, 6, 3


def reference(hidden, lm_head, last, head, target_ids, mask, num_steps, base=0.8):
    """At step k position t predicts token t + 2 + k, whose distribution is the target's at t + 1 + k: one at a time."""
    total, count = torch.zeros(()), 0
    per_step = [[0.0, 0, 0.0, 0] for _ in range(num_steps)]
    batch, length = mask.shape
    for b in range(batch):
        for label in range(2, length):  # the token that is predicted
            if not mask[b, label]:
                continue
            count += 1
            z = head @ last[b, label - 1]
            for k in range(num_steps):
                t = label - 2 - k
                if t < 0:
                    continue
                logits = lm_head @ hidden[k, b, t]
                best = int(z.argmax())
                per_step[k][1] += 1
                per_step[k][0] += float(target_ids[int(logits.argmax())] == best)
                if best in target_ids.tolist():
                    p = torch.softmax(z[target_ids], 0)
                    total = total - base**k * (p * torch.log_softmax(logits, 0)).sum()
                    per_step[k][2] += torch.minimum(torch.softmax(z, 0)[target_ids], torch.softmax(logits, 0)).sum().item()
                    per_step[k][3] += 1
    return total, count, per_step


def make(seed=0, draft_vocab=5, batch=2, length=8):
    torch.manual_seed(seed)
    hidden = torch.randn(STEPS, batch, length, HIDDEN, requires_grad=True)
    lm_head = torch.randn(draft_vocab, HIDDEN, requires_grad=True)
    last, head = torch.randn(batch, length, HIDDEN), torch.randn(VOCAB, HIDDEN)
    target_ids = torch.randperm(VOCAB)[:draft_vocab].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, target_ids, True)
    return hidden, lm_head, last, head, target_ids, t2d


MASKS = {
    "everything": torch.ones(2, 8),
    "a turn in the middle": torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 1, 1]]),
    "first and last label": torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]),
}


def sums_of(hidden, lm_head, last, head, target_ids, t2d, mask):
    return Eagle3Objective()(
        hidden,
        lm_head,
        last_hidden_state=last,
        target_head=head,
        target_ids=target_ids,
        t2d=t2d,
        rows=supervised_positions(mask),
    )


@pytest.mark.parametrize("name", MASKS)
def test_alignment_on_hand_made_sequences(name):
    mask = MASKS[name]
    hidden, lm_head, last, head, target_ids, t2d = make()
    sums = sums_of(hidden, lm_head, last, head, target_ids, t2d, mask)
    total, count, per_step = reference(hidden, lm_head, last, head, target_ids, mask, STEPS)
    assert torch.allclose(sums.loss.numerator, total, rtol=1e-5)
    assert sums.loss.denominator.item() == count
    accuracy, acceptance = sums.metrics["accuracy"], sums.metrics["acceptance_rate"]
    for k, (correct, masked, accepted, supervised) in enumerate(per_step):
        assert (accuracy.numerator[k].item(), accuracy.denominator[k].item()) == (correct, masked)
        assert acceptance.denominator[k].item() == supervised
        assert acceptance.numerator[k].item() == pytest.approx(accepted, rel=1e-5)
    found = torch.autograd.grad(sums.loss.numerator, (hidden, lm_head))
    for one, other in zip(found, torch.autograd.grad(total, (hidden, lm_head)), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_nothing_supervised_is_zero_with_zero_gradient():
    hidden, lm_head, last, head, target_ids, t2d = make()
    sums = sums_of(hidden, lm_head, last, head, target_ids, t2d, torch.zeros(2, 8))
    sums.loss.numerator.backward()
    assert sums.loss.numerator == sums.loss.denominator == 0
    assert hidden.grad.abs().max() == lm_head.grad.abs().max() == 0


def test_a_target_far_from_the_draft_vocabulary_is_finite():
    """Every kept token 200 nats below the target's choice: not supervised, and no 0 / 0."""
    hidden, lm_head, last, head, target_ids, t2d = make()
    chosen = int((~t2d).nonzero()[0])
    head[chosen] = 100 * last[0, 3] / last[0, 3].norm()
    last[0, 3] *= 10
    sums = sums_of(hidden, lm_head, last, head, target_ids, t2d, torch.ones(2, 8))
    sums.loss.numerator.backward()
    for tensor in (sums.loss.numerator, hidden.grad, lm_head.grad):
        assert torch.isfinite(tensor).all()


def lk_reference(options, hidden, lm_head, last, head, target_ids, t2d, rows):
    """The LK losses (arXiv 2602.23881) by autograd over whole matrices."""
    total = torch.zeros(())
    count = float(len(rows.teacher))
    z = last.flatten(0, 1)[rows.teacher] @ head.T
    p, full = torch.softmax(z[:, target_ids], -1), torch.softmax(z, -1)[:, target_ids]
    for k in range(STEPS):
        valid = (rows.room >= k) & t2d[z.argmax(-1)]
        logits = (hidden[k].flatten(0, 1)[(rows.student - k).clamp(min=0)] @ lm_head.T)[valid]
        acceptance = torch.minimum(full[valid], torch.softmax(logits, -1)).sum(-1)
        if options.lk_loss == "alpha":
            loss = -acceptance.log().mean() * count
        else:
            kl = -(p[valid] * F.log_softmax(logits, -1)).sum() / count
            weight = options.kl_scale * torch.exp(-options.kl_decay * acceptance.mean()).detach()
            loss = (weight * kl + (1 - weight) * (1 - acceptance.mean())) * count
        total = total + 0.8**k * loss
    return total


@pytest.mark.parametrize("lk_loss", ["alpha", "lambda"])
def test_lk_losses(lk_loss):
    hidden, lm_head, last, head, target_ids, t2d = make(draft_vocab=8)
    rows, options = supervised_positions(torch.ones(2, 8)), Eagle3Objective(lk_loss=lk_loss)
    sums = options(hidden, lm_head, last_hidden_state=last, target_head=head, target_ids=target_ids, t2d=t2d, rows=rows)
    expected = lk_reference(options, hidden, lm_head, last, head, target_ids, t2d, rows)
    assert torch.allclose(sums.loss.numerator, expected, rtol=1e-5)
    found = torch.autograd.grad(sums.loss.numerator, (hidden, lm_head))
    for one, other in zip(found, torch.autograd.grad(expected, (hidden, lm_head)), strict=True):
        assert torch.allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("lk_loss", [None, "alpha", "lambda"])
def test_tiles_do_not_matter(monkeypatch, lk_loss):
    results = []
    for rows in (1, 7, 10**6):
        monkeypatch.setattr(tiles, "TILE_ROWS", rows)
        hidden, lm_head, last, head, target_ids, t2d = make()
        sums = Eagle3Objective(lk_loss=lk_loss)(
            hidden,
            lm_head,
            last_hidden_state=last,
            target_head=head,
            target_ids=target_ids,
            t2d=t2d,
            rows=supervised_positions(MASKS["a turn in the middle"]),
        )
        results.append([sums.loss.numerator, *torch.autograd.grad(sums.loss.numerator, (hidden, lm_head))])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.allclose(one, two, atol=1e-5)


def test_padding_and_batching_do_not_matter():
    hidden, lm_head, last, head, target_ids, t2d = make()
    mask = MASKS["everything"].clone()
    mask[1, 5:] = 0  # the second sample has 5 tokens and 3 of padding

    def numerator(rows):
        sums = Eagle3Objective()(
            hidden[:, rows], lm_head, last_hidden_state=last[rows], target_head=head, target_ids=target_ids, t2d=t2d,
            rows=supervised_positions(mask[rows]),
        )  # fmt: skip
        return sums.loss.numerator

    assert torch.allclose(numerator([0, 1]), numerator([0]) + numerator([1]), rtol=1e-5)


def test_under_autocast_it_is_close():
    hidden, lm_head, last, head, target_ids, t2d = make()
    arguments = {"last_hidden_state": last, "target_head": head, "target_ids": target_ids, "t2d": t2d}
    rows = supervised_positions(MASKS["everything"])
    exact = Eagle3Objective()(hidden, lm_head, rows=rows, **arguments).loss.numerator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = Eagle3Objective()(hidden, lm_head, rows=rows, **arguments).loss.numerator
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact) < 0.02 * exact
    rounded.backward()
    assert hidden.grad.dtype == lm_head.grad.dtype == torch.float32
