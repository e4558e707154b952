"""The target's own output, as tests compare with it."""

from collections.abc import Sequence

from lightning_dataflow.evaluation import NoDrafter, SpeculativeDecoder
from lightning_dataflow.targets import HFTargetEngine


def greedy_decode(target: HFTargetEngine, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """One token a forward pass."""
    return SpeculativeDecoder(target, NoDrafter()).generate(prompt, max_new_tokens).tokens
