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

    A draft is a proposal of K tokens that the target verified. All accepted tokens of it count, even those behind an end
    token or `max_new_tokens`, where the output is cut. The first token of an output comes from the prompt's own pass,
    without a draft.

    Attributes:
        backend: what decoded: `hf`, `vllm` or `sglang_server`.
        num_tokens: generated, after the cut.
        accepted_per_position: how often the proposal was accepted at least up to position i; K counts.
        seconds: of decoding, including the draft's work.
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
        """Counts and the numbers derived from them."""
        derived = [name for name, value in vars(AcceptanceReport).items() if isinstance(value, property)]
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What was generated for every prompt, with a draft or without.

    Attributes:
        tokens: of each prompt.
        seconds: of decoding all of them.
        num_drafts, accepted_per_position: as in AcceptanceReport.
    """

    tokens: Sequence[Sequence[int]]
    seconds: float
    num_drafts: int = 0
    accepted_per_position: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.tokens))

    def report(self, backend: str, plain: "Decoded | None", *, temperature: float) -> AcceptanceReport:
        """Compare with what the target alone generated for the same prompts, if that was measured."""
        identical = None
        if plain is not None and temperature == 0:
            identical = sum(own == other for own, other in zip(self.tokens, plain.tokens, strict=True))
        return AcceptanceReport(
            backend=backend,
            num_prompts=len(self.tokens),
            num_tokens=self.num_tokens,
            num_drafts=self.num_drafts,
            accepted_per_position=tuple(self.accepted_per_position),
            seconds=self.seconds,
            plain_tokens=plain.num_tokens if plain else None,
            plain_seconds=plain.seconds if plain else None,
            num_identical=identical,
        )


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How any backend decodes.

    Args:
        temperature: 0 for greedy decoding.
        batch_size: how many prompts are decoded at a time.

    Raises:
        UserError: a temperature that no backend accepts.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise UserError(
                f"evaluate.temperature={self.temperature}: use 0 for greedy decoding, or a number from "
                f"{LEAST_TEMPERATURE} on"
            )


def evaluate_acceptance(
    target: HFTargetEngine,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    baseline: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AcceptanceReport:
    """Decode every prompt speculatively and count.

    Random draws for a prompt depend on the seed and its tokens only, not on the other prompts of its batch. A batch begins
    when all prompts of the one before have ended.

    Args:
        baseline: also decode with the target alone, by the same code, for the speed-up; and at temperature 0 compare token
            for token.
        progress: called with (prompts decoded, prompts in all).

    Raises:
        UserError: several prompts at a time for a target that cannot decode them together.
    """
    decoders = [SpeculativeDecoder(target, drafter, temperature=decoding.temperature)]
    if baseline:
        alone = SpeculativeDecoder(target, NoDrafter(), temperature=decoding.temperature)
        for prompt in prompts[:1]:
            alone.generate(prompt, min(2, decoding.max_new_tokens))  # warm-up; not timed
        decoders.append(alone)
    batches = [[_nothing(decoder) for decoder in decoders]]  # a rank may have no prompts
    for first in range(0, len(prompts), decoding.batch_size):
        batch = prompts[first : first + decoding.batch_size]
        batches.append([_decode(decoder, batch, decoding) for decoder in decoders])  # in turn: the machine's speed drifts
        progress(first + len(batch), len(prompts))
    drafted, *plain = [_sum(parts) for parts in zip(*batches, strict=True)]
    return drafted.report("hf", plain[0] if plain else None, temperature=decoding.temperature)


def _nothing(decoder: SpeculativeDecoder) -> Decoded:
    return Decoded(tokens=[], seconds=0.0, accepted_per_position=[0] * decoder.drafter.num_draft_tokens)


def _decode(decoder: SpeculativeDecoder, batch: Sequence[Sequence[int]], decoding: Decoding) -> Decoded:
    start = time.perf_counter()
    generators = [_generator(decoder.target, prompt, decoding.seed) for prompt in batch]
    generations = decoder.generate_batch(batch, decoding.max_new_tokens, generators)
    positions = range(decoder.drafter.num_draft_tokens)
    return Decoded(
        tokens=[generation.tokens for generation in generations],
        seconds=time.perf_counter() - start,
        num_drafts=sum(generation.num_drafts for generation in generations),
        accepted_per_position=[sum(each.accepted_per_position[i] for each in generations) for i in positions],
    )


def _sum(parts: Sequence[Decoded]) -> Decoded:
    return Decoded(
        tokens=[tokens for part in parts for tokens in part.tokens],
        seconds=sum(part.seconds for part in parts),
        num_drafts=sum(part.num_drafts for part in parts),
        accepted_per_position=[sum(column) for column in zip(*(part.accepted_per_position for part in parts), strict=True)],
    )


def _generator(target: HFTargetEngine, prompt: Sequence[int], seed: int) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, list(prompt))).encode()).digest()
    own_seed = int.from_bytes(digest[:4], "little")  # torch's CPU generator reads 32 bits
    return torch.Generator(device=target.device).manual_seed(own_seed)
