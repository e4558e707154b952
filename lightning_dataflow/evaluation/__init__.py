"""Real speculative decoding in PyTorch, and the numbers people compare drafts by."""

from lightning_dataflow.evaluation.acceptance import AcceptanceReport, evaluate_acceptance
from lightning_dataflow.evaluation.block import BlockDrafter, DominoDrafter
from lightning_dataflow.evaluation.chain import ChainDrafter
from lightning_dataflow.evaluation.sglang_server import SGLangDecoder
from lightning_dataflow.evaluation.speculative import Drafter, Generation, NoDrafter, Proposal, SpeculativeDecoder
from lightning_dataflow.evaluation.vllm_process import VLLMDecoder

__all__ = [
    "AcceptanceReport",
    "BlockDrafter",
    "ChainDrafter",
    "DominoDrafter",
    "Drafter",
    "Generation",
    "NoDrafter",
    "Proposal",
    "SGLangDecoder",
    "SpeculativeDecoder",
    "VLLMDecoder",
    "evaluate_acceptance",
]
