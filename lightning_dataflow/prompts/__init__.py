"""Prompts: records of conversations, text or token ids, turned into token ids with a loss mask."""

from lightning_dataflow.prompts.dataset import PromptDataset, TokenizedPrompt, load_prompts
from lightning_dataflow.prompts.questions import load_questions

__all__ = ["PromptDataset", "TokenizedPrompt", "load_prompts", "load_questions"]
