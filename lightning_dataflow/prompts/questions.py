"""Prompts to measure drafts on, in the formats in which benchmarks are distributed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.conversation import token_ids
from lightning_dataflow.prompts.masking import Encoder, Unusable
from lightning_dataflow.prompts.sources import read_records
from lightning_dataflow.prompts.unread import check_question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAPES = "turns (MT-Bench), question (GSM8K), prompt (HumanEval, or MT-Bench's list), or input_ids"


def load_questions(
    path: str, tokenizer: "PreTrainedTokenizerBase", *, num_prompts: int | None = None, chat_template: str | None = None
) -> list[list[int]]:
    """Token ids of each record's question, rendered as a user's message with the generation prompt.

    Only the first of several turns is asked. A tokenizer without a chat template gets the bare text.

    Args:
        path: a JSONL file; each record has `turns`, `prompt`, `question` or `input_ids`.
        num_prompts: how many to take, from the start of the file; None for all.
        chat_template: replaces the tokenizer's own.

    Raises:
        UserError: missing or broken file, a record of another shape or with a system prompt, tools or the like, fewer
            records than asked for.
    """
    if num_prompts is not None and num_prompts < 1:
        raise UserError(f"evaluate.num_prompts={num_prompts}: ask at least 1 prompt, or null for all")
    encoder = Encoder(tokenizer, chat_template)
    prompts: list[list[int]] = []
    for number, record in read_records(path, setting="evaluate.data"):
        if len(prompts) == num_prompts:
            break
        where = f"{path}, line {number}"
        question = _question(record, where)
        try:
            ids = question if isinstance(question, list) else encoder.encode_question(question)
        except Unusable as reason:
            raise UserError(f"{where}: {reason}") from reason
        if not ids:
            raise UserError(f"{where}: the prompt is empty, so there is nothing to continue: remove the line")
        prompts.append(ids)
    if not prompts:
        raise UserError(f"{path} has no prompts: give a file with some")
    if len(prompts) < (num_prompts or 0):
        raise UserError(f"{path} has {len(prompts)} prompts, evaluate.num_prompts={num_prompts}: give more, or ask fewer")
    return prompts


def _question(record: Mapping[str, Any], where: str) -> str | list[int]:
    """The text to ask, or token ids."""
    for key in ("input_ids", "turns", "prompt", "question"):
        if key not in record:
            continue
        value = record[key]
        try:
            if key == "input_ids":
                return list(token_ids(value))
            check_question(record)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if key in ("turns", "prompt") and isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} is not text, or a list that begins with text")
        return value
    raise UserError(f"{where}: keys {sorted(record)} have no question; expected {SHAPES}")
