"""Real speculative decoding in PyTorch, and the numbers people compare drafts by."""

from lightning_dataflow.evaluation.acceptance import AcceptanceReport, evaluate_acceptance
from lightning_dataflow.evaluation.block import BlockDrafter, DominoDrafter
from lightning_dataflow.evaluation.chain import ChainDrafter
from lightning_dataflow.evaluation.speculative import Drafter, Generation, Proposal, SpeculativeDecoder

__all__ = [
    "AcceptanceReport",
    "BlockDrafter",
    "ChainDrafter",
    "DominoDrafter",
    "Drafter",
    "Generation",
    "Proposal",
    "SpeculativeDecoder",
    "evaluate_acceptance",
]
