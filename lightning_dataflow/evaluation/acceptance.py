"""Acceptance length over a set of prompts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_dataflow.evaluation.speculative import Drafter, SpeculativeDecoder, greedy_decode
from lightning_dataflow.targets.hf import HFTargetEngine


@dataclass(frozen=True, kw_only=True)
class AcceptanceReport:
    """Counts over all prompts.

    Attributes:
        accepted_per_position: how often the proposal was accepted at least up to position i.
        num_identical: of the prompts checked, how many outputs equal the target's own, token for token; None when
            not checked.
    """

    num_prompts: int
    num_tokens: int
    num_drafts: int
    accepted_per_position: tuple[int, ...]
    seconds: float
    target_seconds: float | None = None
    num_identical: int | None = None

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verification: 1 + accepted draft tokens."""
        return 1 + sum(self.accepted_per_position) / max(1, self.num_drafts)

    @property
    def acceptance_per_position(self) -> tuple[float, ...]:
        """Share of proposals accepted at least up to each position."""
        return tuple(count / max(1, self.num_drafts) for count in self.accepted_per_position)

    @property
    def tokens_per_target_forward(self) -> float:
        """Generated tokens per forward pass of the target, the prompt's own pass included."""
        return self.num_tokens / max(1, self.num_drafts + self.num_prompts)

    def to_json(self) -> dict[str, Any]:
        """Counts and the numbers made of them."""
        return asdict(self) | {
            "acceptance_length": self.acceptance_length,
            "acceptance_per_position": self.acceptance_per_position,
            "tokens_per_target_forward": self.tokens_per_target_forward,
        }


def evaluate_acceptance(
    target: HFTargetEngine,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    check_lossless: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AcceptanceReport:
    """Decode every prompt speculatively and count.

    Args:
        check_lossless: also decode greedily with the target alone, and compare token for token (temperature 0 only).
    """
    decoder = SpeculativeDecoder(target, drafter, temperature=temperature, seed=seed)
    counts = [0] * drafter.num_draft_tokens
    num_tokens = num_drafts = num_identical = 0
    seconds = target_seconds = 0.0
    check = check_lossless and temperature == 0
    for done, prompt in enumerate(prompts, start=1):
        start = time.perf_counter()
        generation = decoder.generate(prompt, max_new_tokens)
        seconds += time.perf_counter() - start
        num_tokens += len(generation.tokens)
        num_drafts += generation.num_drafts
        counts = [a + b for a, b in zip(counts, generation.accepted_per_position, strict=True)]
        if check:
            start = time.perf_counter()
            num_identical += greedy_decode(target, prompt, max_new_tokens) == generation.tokens
            target_seconds += time.perf_counter() - start
        progress(done, len(prompts))
    return AcceptanceReport(
        num_prompts=len(prompts),
        num_tokens=num_tokens,
        num_drafts=num_drafts,
        accepted_per_position=tuple(counts),
        seconds=seconds,
        target_seconds=target_seconds if check else None,
        num_identical=num_identical if check else None,
    )
