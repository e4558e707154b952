"""The prompts of a run, and the files that say how to read them."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_dataflow.config.schema import DataConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.validation import check_id
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
    return None if data.chat_template is None else _read(data.chat_template, "data.chat_template")


def read_skip_ids(path: str | None) -> frozenset[str]:
    """Source ids of samples not to train on. Raises UserError for a line that is no id."""
    lines = [] if path is None else _read(path, "data.skip_ids").splitlines()
    ids = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    for number, name in ids.items():
        try:
            check_id(name, "source id")
        except UserError as error:
            raise UserError(f"data.skip_ids={path}, line {number}: {error}") from error
    return frozenset(ids.values())


def _read(path: str, setting: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {setting}={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {setting}={path}: it is not UTF-8 text") from error
