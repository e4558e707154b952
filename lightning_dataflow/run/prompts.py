"""The prompts of a run, and the files that say how to read them."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_dataflow.config.schema import DataConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts import PromptDataset, load_prompts


def read_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptDataset, PromptDataset]:
    """(training, held-out) prompts."""
    return load_prompts(
        data.path,
        tokenizer,
        max_length=data.max_length,
        format=data.format,
        split=data.split,
        num_samples=data.num_samples,
        num_eval_samples=data.num_eval_samples,
        chat_template=read_chat_template(data),
    )


def read_chat_template(data: DataConfig) -> str | None:
    """The template that replaces the tokenizer's, if one is given."""
    if data.chat_template is None:
        return None
    try:
        return Path(data.chat_template).read_text()
    except OSError as error:
        raise UserError(f"cannot read data.chat_template={data.chat_template}: {error.strerror}") from error
