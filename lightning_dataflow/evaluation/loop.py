"""Speculative decoding (arXiv 2211.17192): a draft proposes K tokens, the target verifies them in one forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
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
        """A copy that shares the draft's weights, for another sequence."""
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

    def reset(self) -> None: ...

    def observe(self, next_tokens: Sequence[int], aux_hidden_states: Tensor) -> None: ...

    def propose(self, temperature: float, generator: torch.Generator) -> Proposal:
        return Proposal([])


@dataclass
class Generation:
    """One generated continuation.

    All accepted tokens of a proposal count, even those behind an end token or `max_new_tokens`, where `tokens` is cut; vLLM
    counts the same way.

    Attributes:
        tokens: generated ids, the first of them sampled from the prompt's own forward pass.
        num_drafts: proposals verified, each by one forward pass of the target.
        accepted_per_position: how often the proposal was accepted at least up to position i.
    """

    tokens: list[int]
    num_drafts: int
    accepted_per_position: list[int]


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
        num_draft_tokens, ends = self.drafter.num_draft_tokens, set(self.target.eos_token_ids)
        batch = TargetBatch(self.target, prompts, room=max_new_tokens + num_draft_tokens)
        sequences: list[_Sequence] = []
        for prompt, generator, logits, aux in zip(prompts, generators, batch.logits, batch.aux, strict=True):
            first = self._choose(logits, generator)
            drafter = self.drafter.fresh()
            drafter.observe([*prompt[1:], first], aux)
            sequences.append(_Sequence(drafter, generator, Generation([first], 0, [0] * num_draft_tokens)))
        unfinished = sequences
        while True:
            tokens = [sequence.generation.tokens for sequence in unfinished]
            rows = [row for row, ids in enumerate(tokens) if len(ids) < max_new_tokens and ends.isdisjoint(ids)]
            if not rows:
                break
            batch.keep(rows)
            unfinished = [unfinished[row] for row in rows]
            self._round(batch, unfinished)
        for sequence in sequences:
            sequence.generation.tokens = _cut(sequence.generation.tokens, max_new_tokens, ends)
        return [sequence.generation for sequence in sequences]

    def _round(self, batch: TargetBatch, sequences: Sequence["_Sequence"]) -> None:
        """Draft, verify, and keep what is accepted and the token after it."""
        proposals = [sequence.drafter.propose(self.temperature, sequence.generator) for sequence in sequences]
        lengths = list(batch.lengths)
        states = batch.extend(
            [
                [sequence.generation.tokens[-1], *proposal.tokens]
                for sequence, proposal in zip(sequences, proposals, strict=True)
            ]
        )
        for row, (sequence, proposal, (logits, aux)) in enumerate(zip(sequences, proposals, states, strict=True)):
            accepted, bonus = self._verify(proposal, logits, sequence.generator)
            lengths[row] += 1 + accepted
            sequence.accept([*proposal.tokens[:accepted], bonus], aux[: accepted + 1])
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

    def accept(self, new_tokens: Sequence[int], aux: Tensor) -> None:
        """Append the accepted tokens of a proposal and the token after them."""
        self.drafter.observe(new_tokens, aux)
        self.generation.tokens += new_tokens
        self.generation.num_drafts += 1
        for position in range(len(new_tokens) - 1):
            self.generation.accepted_per_position[position] += 1


def check_num_draft_tokens(num_draft_tokens: int, block_size: int, *, first: int = 1) -> None:
    """Raise UserError if blocks are too short for so many tokens; `first` is the offset of the first drafted one."""
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


def _check_finite(logits: Tensor) -> None:
    """−inf excludes a token; NaN and infinity show in the largest."""
    if not logits.amax().isfinite():
        raise NotFiniteError(
            "the target's logits hold NaN or infinity: check its weights, and whether evaluate.dtype is wide enough"
        )


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))


def _cut(tokens: Sequence[int], max_new_tokens: int, ends: set[int]) -> list[int]:
    """Up to the first end token, and no more than `max_new_tokens`."""
    length = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: min(length, max_new_tokens)])
