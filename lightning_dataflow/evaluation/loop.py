"""Speculative decoding (arXiv 2211.17192): a draft proposes K tokens, the target verifies them in one forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.targets.batch import TargetBatch
from lightning_dataflow.targets.hf import HFTargetEngine


@dataclass
class Proposal:
    """K draft tokens; when sampling, the full-vocabulary distributions [K, V] they were drawn from."""

    tokens: list[int]
    probabilities: Tensor | None = None


class Drafter(ABC):
    """What a draft does while decoding one sequence."""

    num_draft_tokens: int

    @abstractmethod
    def reset(self) -> None:
        """Forget the sequence."""

    def fresh(self) -> Self:
        """The same draft, for another sequence beside this one."""
        other = copy(self)
        other.reset()
        return other

    @abstractmethod
    def observe(self, next_tokens: Sequence[int], aux_hidden_states: Tensor) -> None:
        """Verified positions: `aux_hidden_states` [n, n_layers·H] of n new tokens, and the n tokens after them."""

    @abstractmethod
    def propose(self, temperature: float, generator: torch.Generator) -> Proposal:
        """K tokens to follow the last observed one."""


class NoDrafter(Drafter):
    """Proposes nothing, so that the target decodes alone, by the same code."""

    num_draft_tokens = 0

    def reset(self) -> None:
        """See Drafter."""

    def observe(self, next_tokens: Sequence[int], aux_hidden_states: Tensor) -> None:
        """See Drafter."""

    def propose(self, temperature: float, generator: torch.Generator) -> Proposal:
        """See Drafter."""
        return Proposal([])


@dataclass
class Generation:
    """One generated continuation.

    What a proposal got accepted counts whole, also behind an end token or `max_new_tokens`, where `tokens` is cut; so do
    vLLM's counters.

    Attributes:
        tokens: generated ids, the first of them sampled from the prompt's own forward pass.
        num_drafts: proposals verified, each by one forward pass of the target.
        accepted_per_position: how often the proposal was accepted at least up to position i.
    """

    tokens: list[int] = field(default_factory=list)
    num_drafts: int = 0
    accepted_per_position: list[int] = field(default_factory=list)


class SpeculativeDecoder:
    """Decodes with a target and a drafter. The output is the target's own: its greedy choice at temperature 0, its
    distribution above, whatever the draft proposes.

    Args:
        target: with the drafter's capture layers set.
        temperature: 0 for greedy decoding.
        seed: of the draws of `generate`.
    """

    def __init__(self, target: HFTargetEngine, drafter: Drafter, *, temperature: float = 0.0, seed: int = 0):
        self.target = target
        self.drafter = drafter
        self.temperature = temperature
        self.generator = torch.Generator(device=target.device).manual_seed(seed)

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Generation:
        """Continue `prompt` until one of the target's end tokens, or for `max_new_tokens`.

        Raises NotFiniteError when the target's logits hold NaN or infinity: any draft would agree with such a target.
        """
        return self.generate_batch([prompt], max_new_tokens, [self.generator])[0]

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, generators: Sequence[torch.Generator]
    ) -> list[Generation]:
        """Continue each prompt; the target verifies the proposals of all of them in one forward pass.

        Drafts propose one sequence after the other.

        Args:
            generators: of each prompt's draws.
        """
        num_draft_tokens = self.drafter.num_draft_tokens
        batch = TargetBatch(self.target, prompts, room=max_new_tokens + num_draft_tokens)
        every = [
            _Sequence(self.drafter.fresh(), generator, Generation(accepted_per_position=[0] * num_draft_tokens))
            for generator in generators
        ]
        for one, prompt, logits, aux in zip(every, prompts, batch.logits, batch.aux, strict=True):
            first = self._choose(logits, one.generator)
            one.generation.tokens.append(first)
            one.drafter.observe([*prompt[1:], first], aux)
        going = every
        while going := self._unfinished(batch, going, max_new_tokens):
            self._round(batch, going)
        for one in every:
            one.generation.tokens = _cut(one.generation.tokens, max_new_tokens, self.target.eos_token_ids)
        return [one.generation for one in every]

    def _unfinished(self, batch: TargetBatch, going: Sequence["_Sequence"], max_new_tokens: int) -> list["_Sequence"]:
        ends = self.target.eos_token_ids
        rows = [row for row, one in enumerate(going) if not _finished(one.generation.tokens, max_new_tokens, ends)]
        batch.keep(rows)
        return [going[row] for row in rows]

    def _round(self, batch: TargetBatch, going: Sequence["_Sequence"]) -> None:
        """Draft, verify, and keep what is accepted and the token after it."""
        proposals = [one.drafter.propose(self.temperature, one.generator) for one in going]
        lengths = list(batch.lengths)
        states = batch.extend(
            [[one.generation.tokens[-1], *proposal.tokens] for one, proposal in zip(going, proposals, strict=True)]
        )
        for row, (one, proposal, (logits, aux)) in enumerate(zip(going, proposals, states, strict=True)):
            accepted, bonus = self._verify(proposal, logits, one.generator)
            new_tokens = [*proposal.tokens[:accepted], bonus]
            lengths[row] += 1 + accepted
            one.drafter.observe(new_tokens, aux[: accepted + 1])
            one.generation.num_drafts += 1
            for position in range(accepted):
                one.generation.accepted_per_position[position] += 1
            one.generation.tokens += new_tokens
        batch.crop(lengths)

    def _choose(self, logits: Tensor, generator: torch.Generator) -> int:
        _check_finite(logits)
        if self.temperature == 0:
            return int(logits.argmax())
        return _draw(torch.softmax(logits / self.temperature, -1), generator)

    def _verify(self, proposal: Proposal, logits: Tensor, generator: torch.Generator) -> tuple[int, int]:
        """(number of accepted tokens, the token that follows them). logits [K + 1, V]."""
        _check_finite(logits)
        if self.temperature == 0:
            choices = logits.argmax(-1).tolist()
            accepted = 0
            while accepted < len(proposal.tokens) and proposal.tokens[accepted] == choices[accepted]:
                accepted += 1
            return accepted, choices[accepted]
        p = torch.softmax(logits / self.temperature, -1)
        if not proposal.tokens:
            return 0, _draw(p[0], generator)
        assert proposal.probabilities is not None, "a sampled proposal carries its distributions"
        return rejection_sample(p, proposal.probabilities, proposal.tokens, generator)


@dataclass
class _Sequence:
    """One row of a batch."""

    drafter: Drafter
    generator: torch.Generator
    generation: Generation


def check_num_draft_tokens(num_draft_tokens: int, *, block_size: int | None = None, first: int = 1) -> None:
    """Raise UserError unless a draft can propose so many tokens at a time.

    Args:
        block_size: of a draft of whole blocks; None for one that drafts token by token.
        first: the offset in a block from which on tokens are drafted.
    """
    if block_size is None:
        if num_draft_tokens < 1:
            raise UserError(f"evaluate.num_draft_tokens={num_draft_tokens}: a proposal has at least 1 token")
        return
    longest = block_size - first
    if not 1 <= num_draft_tokens <= longest:
        raise UserError(
            f"num_draft_tokens={num_draft_tokens}: this draft's blocks of {block_size} draft at most {longest} tokens, set "
            f"evaluate.num_draft_tokens to 1 up to {longest}"
        )


def rejection_sample(p: Tensor, q: Tensor, tokens: Sequence[int], generator: torch.Generator) -> tuple[int, int]:
    """The standard rule: keep token i with probability min(1, p/q), else draw from max(0, p − q), normalised.

    Args:
        p: the target's distributions [K + 1, V].
        q: the draft's [K, V].
        tokens: K draft tokens, drawn from q.

    Returns the number of kept tokens and the token after them; together they are distributed as the target's own.
    """
    for position, token in enumerate(tokens):
        chance = torch.rand((), generator=generator, device=p.device)
        if chance * q[position, token] >= p[position, token]:
            return position, _draw((p[position] - q[position]).clamp(min=0), generator)
    return len(tokens), _draw(p[len(tokens)], generator)


def greedy_decode(target: HFTargetEngine, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The target's own greedy continuation, one token a forward pass."""
    return SpeculativeDecoder(target, NoDrafter()).generate(prompt, max_new_tokens).tokens


def _check_finite(logits: Tensor) -> None:
    """−inf excludes a token; NaN and infinity show in the largest."""
    if not logits.amax().isfinite():
        raise NotFiniteError(
            "the target's logits hold NaN or infinity: check its weights, and whether evaluate.dtype is wide enough"
        )


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))


def _finished(tokens: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]) -> bool:
    return (
        len(_cut(tokens, max_new_tokens, eos_token_ids)) < len(tokens)
        or len(tokens) == max_new_tokens
        or (tokens[-1] in eos_token_ids)
    )


def _cut(tokens: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]) -> list[int]:
    """Up to the first end token, and no longer than asked for."""
    ends = [index + 1 for index, token in enumerate(tokens) if token in eos_token_ids]
    return list(tokens[: min([max_new_tokens, *ends])])
