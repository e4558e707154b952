"""Acceptance length over a set of prompts."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.evaluation.loop import Drafter, NoDrafter, SpeculativeDecoder
from lightning_dataflow.targets.hf import HFTargetEngine

LEAST_TEMPERATURE = 1e-5
"""Logits divided by less overflow."""


@dataclass(frozen=True, kw_only=True)
class AcceptanceReport:
    """Counts over all prompts, by the conventions of vLLM's `spec_decode` counters.

    A draft is a proposal of K tokens that the target verified. All that it accepted of one counts, also behind an end token
    or `max_new_tokens`, where the output is cut. The first token of an output comes from the prompt's own pass, without a
    draft.

    Attributes:
        backend: who decoded: `hf`, `vllm` or `sglang_server`.
        num_tokens: generated, as cut.
        accepted_per_position: how often the proposal was accepted at least up to position i; K counts.
        seconds: of decoding, the drafts' work included.
        plain_tokens, plain_seconds: the same of the target alone, on the same prompts; None when not measured.
        num_identical: how many outputs equal the target's own, token for token; None when not checked.
    """

    backend: str = "hf"
    num_prompts: int
    num_tokens: int
    num_drafts: int
    accepted_per_position: tuple[int, ...]
    seconds: float
    plain_tokens: int | None = None
    plain_seconds: float | None = None
    num_identical: int | None = None

    @property
    def num_draft_tokens(self) -> int:
        """Proposed in all."""
        return self.num_drafts * len(self.accepted_per_position)

    @property
    def num_accepted_tokens(self) -> int:
        """Of all positions."""
        return sum(self.accepted_per_position)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verification: 1 + accepted draft tokens."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)

    @property
    def acceptance_per_position(self) -> tuple[float, ...]:
        """Share of proposals accepted at least up to each position."""
        return tuple(count / max(1, self.num_drafts) for count in self.accepted_per_position)

    @property
    def tokens_per_target_forward(self) -> float:
        """Generated tokens per forward pass that the target makes for a sequence, the prompt's own pass included."""
        return self.num_tokens / max(1, self.num_drafts + self.num_prompts)

    @property
    def tokens_per_second(self) -> float:
        """With the draft."""
        return self.num_tokens / max(self.seconds, 1e-9)

    @property
    def plain_tokens_per_second(self) -> float | None:
        """Of the target alone."""
        if self.plain_tokens is None or self.plain_seconds is None:
            return None
        return self.plain_tokens / max(self.plain_seconds, 1e-9)

    @property
    def speed_up(self) -> float | None:
        """Tokens per second with the draft over those without it."""
        plain = self.plain_tokens_per_second
        return None if plain is None else self.tokens_per_second / max(plain, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Counts and the numbers made of them."""
        derived = (
            "num_draft_tokens",
            "num_accepted_tokens",
            "acceptance_length",
            "acceptance_per_position",
            "tokens_per_target_forward",
            "tokens_per_second",
            "plain_tokens_per_second",
            "speed_up",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


def evaluate_acceptance(
    target: HFTargetEngine,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    baseline: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AcceptanceReport:
    """Decode every prompt speculatively and count.

    What is drawn for a prompt depends on the seed and its tokens alone, not on the prompts beside it.

    Args:
        batch_size: prompts that the target decodes together; the next ones begin when all of them have ended.
        baseline: also decode with the target alone, by the same code, for the speed-up; and at temperature 0 compare token
            for token.

    Raises:
        UserError: a setting out of range, or several prompts at a time for a target that is not decoded so.
    """
    check_decoding(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size)
    decoder = SpeculativeDecoder(target, drafter, temperature=temperature)
    alone = SpeculativeDecoder(target, NoDrafter(), temperature=temperature)
    counts = [0] * drafter.num_draft_tokens
    num_tokens = num_drafts = plain_tokens = num_identical = 0
    seconds = plain_seconds = 0.0
    if baseline:  # what the first pass has to set up is nobody's
        alone.generate(prompts[0], min(2, max_new_tokens))
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        start = time.perf_counter()
        generations = decoder.generate_batch(batch, max_new_tokens, _generators(target, batch, seed))
        seconds += time.perf_counter() - start
        for generation in generations:
            num_tokens += len(generation.tokens)
            num_drafts += generation.num_drafts
            counts = [a + b for a, b in zip(counts, generation.accepted_per_position, strict=True)]
        if baseline:
            start = time.perf_counter()
            own = alone.generate_batch(batch, max_new_tokens, _generators(target, batch, seed))
            plain_seconds += time.perf_counter() - start
            plain_tokens += sum(len(generation.tokens) for generation in own)
            num_identical += sum(a.tokens == b.tokens for a, b in zip(generations, own, strict=True))
        progress(min(first + batch_size, len(prompts)), len(prompts))
    return AcceptanceReport(
        num_prompts=len(prompts),
        num_tokens=num_tokens,
        num_drafts=num_drafts,
        accepted_per_position=tuple(counts),
        seconds=seconds,
        plain_tokens=plain_tokens if baseline else None,
        plain_seconds=plain_seconds if baseline else None,
        num_identical=num_identical if baseline and temperature == 0 else None,
    )


def check_decoding(*, max_new_tokens: int, temperature: float, batch_size: int) -> None:
    """Raise UserError for settings that no backend takes."""
    if max_new_tokens < 1:
        raise UserError(f"evaluate.max_new_tokens={max_new_tokens}: nothing would be generated, use at least 1")
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise UserError(
            f"evaluate.temperature={temperature}: use 0 for greedy decoding, or a number from {LEAST_TEMPERATURE} on"
        )
    if batch_size < 1:
        raise UserError(f"evaluate.batch_size={batch_size}: decode at least 1 prompt at a time")


def _generators(target: HFTargetEngine, prompts: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    generators = []
    for prompt in prompts:
        digest = hashlib.sha256(repr((seed, list(prompt))).encode()).digest()
        own_seed = int.from_bytes(digest[:4], "little")  # torch's CPU generator reads 32 bits
        generators.append(torch.Generator(device=target.device).manual_seed(own_seed))
    return generators
