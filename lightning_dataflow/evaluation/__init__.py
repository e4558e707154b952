"""Real speculative decoding in PyTorch, and the numbers people compare drafts by."""

from lightning_dataflow.evaluation.acceptance import AcceptanceReport, evaluate_acceptance
from lightning_dataflow.evaluation.judges.sglang_server import SGLangDecoder
from lightning_dataflow.evaluation.judges.vllm_process import VLLMDecoder
from lightning_dataflow.evaluation.loop import Drafter, Generation, NoDrafter, Proposal, SpeculativeDecoder

__all__ = [
    "AcceptanceReport",
    "Drafter",
    "Generation",
    "NoDrafter",
    "Proposal",
    "SGLangDecoder",
    "SpeculativeDecoder",
    "VLLMDecoder",
    "evaluate_acceptance",
]
