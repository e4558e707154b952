"""Prompts to measure drafts on, in the formats in which benchmarks are distributed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.encoding import Encoder
from lightning_dataflow.prompts.records import Conversation, to_conversation
from lightning_dataflow.prompts.sources import Record, read_records
from lightning_dataflow.prompts.template import ChatTemplate, Unusable
from lightning_dataflow.prompts.tokens import token_ids
from lightning_dataflow.prompts.unread import as_list, check_question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = ("input_ids", "messages", "turns", "prompt", "question")
SHAPES = "turns (MT-Bench), question (GSM8K), prompt (HumanEval, or MT-Bench's list), messages, or input_ids"


def load_questions(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num_prompts: int | None = None,
    **rendering: Any,
) -> list[list[int]]:
    """Token ids of each record's question, rendered as a user's message with the generation prompt.

    Only the first of several turns is asked. Tools, a system prompt and the like are rendered with it. Without a chat
    template the bare text is asked.

    Args:
        path: each record has `turns`, `prompt`, `question`, `messages` or `input_ids`; see `read_records`.
        num_prompts: how many to take, from the start; None for all.
        rendering: further arguments of `ChatTemplate`.

    Raises:
        UserError: missing or broken file, a record of another shape, fewer records than asked for.
    """
    if num_prompts is not None and num_prompts < 1:
        raise UserError(f"evaluate.num_prompts={num_prompts}: ask at least 1 prompt, or null for all")
    encoder = Encoder(ChatTemplate(tokenizer, **rendering))
    prompts: list[list[int]] = []
    for record in read_records(path, setting="evaluate.data"):
        if len(prompts) == num_prompts:
            break
        prompts.append(_encode(encoder, record))
    if not prompts:
        raise UserError(f"{path} has no prompts: give a file with some")
    if len(prompts) < (num_prompts or 0):
        raise UserError(f"{path} has {len(prompts)} prompts, evaluate.num_prompts={num_prompts}: give more, or ask fewer")
    return prompts


def _encode(encoder: Encoder, record: Record) -> list[int]:
    if isinstance(record.data, UserError):
        raise record.data
    try:
        question = _question(record.data)
        ids = question if isinstance(question, list) else encoder.encode_question(question)
    except (UserError, Unusable, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{record.where}: {error}") from error
    if not ids:
        raise UserError(f"{record.where}: the prompt is empty, so there is nothing to continue: remove the record")
    return ids


def _question(record: Mapping[str, Any]) -> Conversation | list[int]:
    """A conversation that ends with the question, or token ids."""
    check_question(record)
    key = next((key for key in KEYS if record.get(key) is not None), None)
    if key is None:
        raise UserError(f"keys {sorted(record)} have no question; expected {SHAPES}")
    value = as_list(record[key])
    if key in ("messages", "prompt") and value == []:
        raise UserError(f"{key} is an empty list: give a question, or remove the record")
    if key == "input_ids":
        return list(token_ids(value))
    if key == "messages" or (key == "prompt" and isinstance(value, list) and isinstance(value[0], Mapping)):
        asked = len(value) - (value[-1]["role"] == "assistant")
        return to_conversation(record, value[:asked])
    text = value[0] if key in ("turns", "prompt") and isinstance(value, list) and value else value
    if not isinstance(text, str):
        raise UserError(f"{key} is not text, or a list that begins with text")
    return to_conversation(record, [{"role": "user", "content": text}])
