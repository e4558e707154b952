"""Real speculative decoding in PyTorch, and the numbers people compare drafts by."""

from lightning_dataflow.evaluation.loop import Drafter as Drafter, Proposal as Proposal
