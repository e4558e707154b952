"""EAGLE3's training objective: K unrolled steps of soft cross-entropy against the target (arXiv 2503.01840), optionally
the LK losses (arXiv 2602.23881)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_dataflow.strategies.common.gradients import with_gradients
from lightning_dataflow.strategies.common.sums import ObjectiveSums, Quotient
from lightning_dataflow.strategies.common.tiles import add_product, compute_dtype, tiles
from lightning_dataflow.targets.logits import LogitsTransform

LKLoss = Literal["alpha", "lambda"]


class TargetRows(NamedTuple):
    """Which rows of the target's states supervise which rows of the draft; M positions whose label is loss-masked.

    Attributes:
        teacher: [M], row of `last_hidden_state` flattened to [B·S, H].
        student: [M], row of the draft's states of step 0, flattened likewise; step k uses row `student` − k.
        room: [M], position of that row in its sequence: steps k > room fall off the left end.
    """

    teacher: Tensor
    student: Tensor
    room: Tensor


def supervised_positions(loss_mask: Tensor, position: Tensor | None = None) -> TargetRows:
    """Align supervision, from the loss mask [B, S] of the tokens.

    The state at position j predicts token j + 1. It supervises step k at position t = j − 1 − k, which has seen tokens up
    to t + 1 + k = j. A position counts when the *predicted* token is loss-masked.

    Args:
        position: int64 [B, S] of each token in its sample, for packed rows; by default each row is one sample.
    """
    if position is None:
        position = torch.arange(loss_mask.shape[1], device=loss_mask.device).expand_as(loss_mask)
    wanted = torch.zeros_like(loss_mask, dtype=torch.bool)
    wanted[:, :-1] = (loss_mask[:, 1:] > 0) & (position[:, 1:] >= 2)
    teacher = wanted.flatten().nonzero().squeeze(-1)
    return TargetRows(teacher=teacher, student=teacher - 1, room=position.flatten()[teacher] - 1)


@dataclass(frozen=True, kw_only=True)
class Eagle3Objective:
    """Options of the objective.

    The loss is Σ_k step_weight_base^k · Loss_k over one denominator, the number of positions whose label is loss-masked.
    With `lk_loss`, the per-step means inside Loss_k are those of the micro-batch. This loss therefore depends on how a
    window is cut into micro-batches; no other loss here does.

    Attributes:
        lk_loss: None for Loss_k = −Σ p log q; `alpha` for the mean of −log acceptance; `lambda` for
            w·KL + (1 − w)(1 − ᾱ) with w = kl_scale · exp(−kl_decay · ᾱ).
    """

    step_weight_base: float = 0.8
    lk_loss: LKLoss | None = None
    kl_scale: float = 0.9
    kl_decay: float = 1.5

    def __call__(
        self,
        hidden: Tensor,
        lm_head: Tensor,
        *,
        last_hidden_state: Tensor,
        target_head: Tensor,
        target_ids: Tensor,
        t2d: Tensor,
        rows: TargetRows,
        normaliser: Tensor | None = None,
        transform: LogitsTransform | None = None,
    ) -> ObjectiveSums:
        """Score K steps.

        Args:
            hidden: normed hidden states of the draft [K, B, S, H].
            lm_head: the draft's head [V_d, H].
            last_hidden_state: the target's, after its final norm, [B, S, H_t].
            target_head: the target's head [V, H_t], frozen.
            target_ids: target id of each draft id, [V_d].
            t2d: bool [V].
            rows: see `supervised_positions`.
            normaliser: the loss's denominator, M by default.
            transform: what the target does to the products of its head; the draft's own head is plain.

        Metrics, each a vector over steps: `loss_per_step`, `accuracy` (draft's argmax is the target's, over loss-masked
        positions) and `acceptance_rate` (Σ_v min(p_v, q_v), p over the full vocabulary, over supervised positions: those
        whose target argmax is in the draft vocabulary). `outside_vocab`, a scalar, is the share of loss-masked positions
        that are not supervised.
        """
        if normaliser is None:
            # Not torch.tensor, which copies from the host and waits for the device.
            normaliser = torch.full((), float(len(rows.teacher)), dtype=torch.float32, device=hidden.device)
        teacher = _Teacher(last_hidden_state.flatten(0, 1), target_head, target_ids, t2d, rows, transform)
        run = _Run(hidden, lm_head, teacher, self, normaliser)
        loss_k, correct, masked, accepted, supervised = run.score()
        total = (run.step_weights * loss_k).sum()
        return ObjectiveSums(
            loss=Quotient(
                numerator=with_gradients(total, (hidden, lm_head), (run.grad_hidden, run.grad_head)), denominator=normaliser
            ),
            metrics={
                "loss_per_step": Quotient(numerator=loss_k, denominator=normaliser.expand_as(loss_k)),
                "accuracy": Quotient(numerator=correct, denominator=masked),
                "acceptance_rate": Quotient(numerator=accepted, denominator=supervised),
                "outside_vocab": Quotient(numerator=masked[0] - supervised[0], denominator=masked[0]),
            },
        )


class _TeacherTile(NamedTuple):
    """What the target says about one tile of R positions.

    p, p_full: [R, V_d], normalised over the draft and over the full vocabulary; argmax [R] over the full vocabulary;
    supervised [R], whether that argmax is in the draft vocabulary.
    """

    p: Tensor
    p_full: Tensor
    argmax: Tensor
    supervised: Tensor


@dataclass(frozen=True)
class _Teacher:
    states: Tensor
    head: Tensor
    target_ids: Tensor
    t2d: Tensor
    rows: TargetRows
    transform: LogitsTransform | None = None

    def tile(self, part: slice) -> _TeacherTile:
        """One full-vocabulary pass over a part of the rows."""
        states = self.states[self.rows.teacher[part]].to(self.head.dtype)
        logits = (states @ self.head.T).float()
        if self.transform is not None:
            self.transform.apply_(logits)
        argmax = logits.argmax(-1)
        lse = torch.logsumexp(logits, -1, keepdim=True)
        kept = logits if len(self.target_ids) == logits.shape[-1] else logits.index_select(-1, self.target_ids)
        p_full = torch.sub(kept, lse).exp_()
        return _TeacherTile(torch.softmax(kept, -1), p_full, argmax, self.t2d[argmax])


class _Run:
    """One evaluation of the loss over all tiles.

    Attributes:
        num_supervised, acceptance: [K], of the whole micro-batch; an LK loss needs them before its gradients.
    """

    def __init__(self, hidden: Tensor, lm_head: Tensor, teacher: _Teacher, options: Eagle3Objective, normaliser: Tensor):
        self.num_steps = len(hidden)
        self.states = hidden.detach().flatten(0, 2)
        self.rows_per_step = hidden.shape[1] * hidden.shape[2]
        self.lm_head = lm_head.detach().to(compute_dtype(hidden))
        self.teacher, self.options, self.normaliser = teacher, options, normaliser
        self.grad_hidden, self.grad_head = (torch.zeros_like(x, dtype=torch.float32) for x in (hidden, lm_head))
        steps = torch.arange(self.num_steps, dtype=torch.float32, device=hidden.device)
        self.step_weights = options.step_weight_base**steps
        if options.lk_loss is not None:
            self.num_supervised, self.acceptance = self.measure()

    def tiles(self) -> Iterator[slice]:
        """Tiles of positions; each position has a row of student logits at every step."""
        return tiles(len(self.teacher.rows.teacher), self.num_steps)

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, Tensor]:
        """First pass of an LK loss: how many positions are supervised, and their mean acceptance, per step."""
        sums = torch.zeros(2, self.num_steps, dtype=torch.float32, device=self.states.device)
        with torch.autocast(self.states.device.type, enabled=False):
            for part in self.tiles():
                tile = self.teacher.tile(part)
                _, valid, logits = self.student(part)
                supervised = valid & tile.supervised
                q = torch.softmax(logits, -1).unflatten(0, (self.num_steps, -1))
                sums[0] += supervised.sum(1)
                sums[1] += (torch.minimum(q, tile.p_full).sum(-1) * supervised).sum(1)
        return sums[0], sums[1] / sums[0].clamp(min=1)

    @torch.no_grad()
    def score(self) -> Tensor:
        """Sums [5, K]: loss, correct, loss-masked, accepted, supervised. Fills the gradients."""
        sums = torch.zeros(5, self.num_steps, dtype=torch.float32, device=self.states.device)
        with torch.autocast(self.states.device.type, enabled=False):
            for part in self.tiles():
                sums += self._score_tile(part, self.teacher.tile(part))
        if self.options.lk_loss == "lambda":  # (1 − w)(1 − ᾱ) is a mean: scale it to the loss's denominator
            kl_weight = self._kl_weight()
            sums[0] = kl_weight * sums[0] + (1 - kl_weight) * (1 - self.acceptance) * self.normaliser
        return sums

    def student(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [K·R] of the flattened hidden states, whether they exist [K, R], and their logits [K·R, V_d]."""
        steps = torch.arange(self.num_steps, device=self.states.device)[:, None]
        valid = self.teacher.rows.room[part] >= steps
        rows = self.teacher.rows.student[part] - steps
        rows = (torch.where(valid, rows, 0) + steps * self.rows_per_step).flatten()
        logits = (self.states[rows].to(self.lm_head.dtype) @ self.lm_head.T).float()
        return rows, valid, logits

    def _score_tile(self, part: slice, tile: _TeacherTile) -> Tensor:
        rows, valid, logits = self.student(part)
        supervised = valid & tile.supervised
        shape = (self.num_steps, -1, logits.shape[-1])
        expected = torch.linalg.vecdot(logits.view(shape), tile.p)
        q = torch.softmax(logits, -1).view(shape)
        top, index = q.max(-1)
        top_logit = logits.view(shape).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        cross_entropy = top_logit - top.log() - expected
        correct = self.teacher.target_ids[index] == tile.argmax
        overlap = torch.minimum(q, tile.p_full, out=logits.view(shape)).sum(-1)
        loss, grad, weight = self._loss_and_grad(cross_entropy, overlap, q, tile, supervised)
        self._accumulate(rows, grad.flatten(0, 1), weight.flatten())
        counted = [loss * supervised, correct & valid, valid, overlap * supervised, supervised]
        return torch.stack([count.sum(1).float() for count in counted])

    def _loss_and_grad(
        self, cross_entropy: Tensor, overlap: Tensor, q: Tensor, tile: _TeacherTile, supervised: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss per row [K, R], d loss/d logits before weighting [K, R, V_d] (in q's memory), and the rows' weights."""
        weight = self.step_weights[:, None] * supervised
        if self.options.lk_loss is None:
            return cross_entropy, q.sub_(tile.p), weight
        # d overlap / d logits = q · (below − Σ q·below), below marking where q < p.
        below = q < tile.p_full
        inside = (q * below).sum(-1, keepdim=True)
        per_mean = self.normaliser / self.num_supervised.clamp(min=1)[:, None]
        if self.options.lk_loss == "alpha":
            safe = overlap.clamp(min=torch.finfo(overlap.dtype).tiny)
            scale = torch.where(overlap > 0, 1 / safe, 0)
            loss = torch.where(overlap > 0, -safe.log(), 0) * per_mean
            return loss, q.mul_(inside - below.float()).mul_(scale.unsqueeze(-1)), weight * per_mean
        kl_weight = self._kl_weight()[:, None, None]
        overlap_grad = q * (inside - below.float()) * (per_mean.unsqueeze(-1) * (1 - kl_weight))
        return cross_entropy, q.sub_(tile.p).mul_(kl_weight).add_(overlap_grad), weight

    def _kl_weight(self) -> Tensor:
        return self.options.kl_scale * torch.exp(-self.options.kl_decay * self.acceptance)

    def _accumulate(self, rows: Tensor, grad_logits: Tensor, weight: Tensor) -> None:
        """Add a tile's gradients. A row that does not exist has weight 0."""
        grad_logits = grad_logits.to(self.lm_head.dtype)
        grad = (grad_logits @ self.lm_head).float() * weight[:, None]
        self.grad_hidden.view(-1, grad.shape[-1]).index_add_(0, rows, grad)
        add_product(self.grad_head, grad_logits.T, (self.states[rows] * weight[:, None]).to(self.lm_head.dtype))
