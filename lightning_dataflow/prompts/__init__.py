"""Prompts: records of conversations, text or token ids, turned into token ids with a loss mask."""

from lightning_dataflow.prompts.dataset import PromptDataset as PromptDataset
from lightning_dataflow.prompts.loading import load_prompts as load_prompts
from lightning_dataflow.prompts.questions import load_questions as load_questions
