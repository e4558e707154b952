"""Real speculative decoding in PyTorch, and the numbers people compare drafts by."""

from lightning_dataflow.evaluation.acceptance import AcceptanceReport, Decoding, evaluate_acceptance
from lightning_dataflow.evaluation.loop import Drafter, Generation, NoDrafter, Proposal, SpeculativeDecoder

__all__ = [
    "AcceptanceReport",
    "Decoding",
    "Drafter",
    "Generation",
    "NoDrafter",
    "Proposal",
    "SpeculativeDecoder",
    "evaluate_acceptance",
]
