"""Speculative decoding (arXiv 2211.17192): a draft proposes K tokens, the target verifies them in one forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_dataflow.targets.hf import HFTargetEngine, TargetSession


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

    @abstractmethod
    def observe(self, next_tokens: Sequence[int], aux_hidden_states: Tensor) -> None:
        """Verified positions: `aux_hidden_states` [n, n_layers·H] of n new tokens, and the n tokens after them."""

    @abstractmethod
    def propose(self, temperature: float, generator: torch.Generator) -> Proposal:
        """K tokens to follow the last observed one."""


@dataclass
class Generation:
    """One generated continuation.

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
        seed: of all draws.
    """

    def __init__(self, target: HFTargetEngine, drafter: Drafter, *, temperature: float = 0.0, seed: int = 0):
        self.target = target
        self.drafter = drafter
        self.temperature = temperature
        self.generator = torch.Generator(device=target.device).manual_seed(seed)

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Generation:
        """Continue `prompt` until one of the target's end tokens, or for `max_new_tokens`."""
        eos_token_ids = self.target.eos_token_ids
        session = TargetSession(self.target, rollback=True)
        self.drafter.reset()
        generation = Generation(accepted_per_position=[0] * self.drafter.num_draft_tokens)
        logits, aux = session.extend(prompt)
        session.crop(len(prompt))
        pending = self._choose(logits[-1])
        generation.tokens.append(pending)
        self.drafter.observe([*prompt[1:], pending], aux)
        while not _finished(generation.tokens, max_new_tokens, eos_token_ids):
            proposal = self.drafter.propose(self.temperature, self.generator)
            length = session.length
            logits, aux = session.extend([pending, *proposal.tokens])
            accepted, bonus = self._verify(proposal, logits)
            session.crop(length + 1 + accepted)
            new_tokens = [*proposal.tokens[:accepted], bonus]
            self.drafter.observe(new_tokens, aux[: accepted + 1])
            generation.num_drafts += 1
            for position in range(accepted):
                generation.accepted_per_position[position] += 1
            generation.tokens += new_tokens
            pending = bonus
        generation.tokens = _cut(generation.tokens, max_new_tokens, eos_token_ids)
        return generation

    def _choose(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        return _draw(torch.softmax(logits / self.temperature, -1), self.generator)

    def _verify(self, proposal: Proposal, logits: Tensor) -> tuple[int, int]:
        """(number of accepted tokens, the token that follows them). logits [K + 1, V]."""
        if self.temperature == 0:
            choices = logits.argmax(-1).tolist()
            accepted = 0
            while accepted < len(proposal.tokens) and proposal.tokens[accepted] == choices[accepted]:
                accepted += 1
            return accepted, choices[accepted]
        assert proposal.probabilities is not None, "a sampled proposal carries its distributions"
        p = torch.softmax(logits / self.temperature, -1)
        return rejection_sample(p, proposal.probabilities, proposal.tokens, self.generator)


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
    eos_token_ids = target.eos_token_ids
    session = TargetSession(target)
    tokens = [int(session.extend(prompt)[0][-1].argmax())]
    while not _finished(tokens, max_new_tokens, eos_token_ids):
        tokens.append(int(session.extend(tokens[-1:])[0][-1].argmax()))
    return tokens


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
