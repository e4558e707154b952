"""Keys that change what a record means and that no reader honours. A record with one is refused, not trained without it."""

import re
from collections.abc import Mapping
from typing import Any

from lightning_dataflow.contracts import UserError

RENDERED = "remove it to train without, or render the conversation yourself and give input_ids and loss_mask"
AS_MESSAGES = "give the conversation as `messages`, whose keys the chat template reads, or remove it to train without"
AS_LOSS_MASK = "give input_ids with a loss_mask that says the same, and remove it"
UNPACKED = "give one sample a record, without padding, and remove it"
TEXT_ONLY = "only text is trained on, so remove it, or the record"
ALL_ALIKE = "all supervised tokens count alike, so remove it, or the record"

_MASK = re.compile(r"(\w+_)?masks?")


def _keys(names: str, remedy: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), remedy)


_WEIGHTS = _keys("weight weights loss_weight loss_weights sample_weight", ALL_ALIKE)
_MEDIA = _keys("image images video videos audio audios pixel_values", TEXT_ONLY)
_THOUGHTS = _keys("reasoning_content reasoning thinking thought", AS_MESSAGES)
_TOKENS = {
    "labels": "give loss_mask, 0 where a label is -100 and 1 elsewhere, and remove it",
    **_keys("attention_mask position_ids segment_ids seq_lengths cu_seqlens", UNPACKED),
}
_CONVERSATION = {
    **_keys("system system_prompt system_message", "give it as the first turn, with the role system"),
    "history": "give the earlier turns in the conversation itself",
    **_keys("tools functions documents chat_template_kwargs", RENDERED),
}
_RECORDS = {
    "sharegpt": _CONVERSATION
    | _keys("chosen rejected", "make the chosen answer a turn of the conversation, and remove it"),
    "messages": _CONVERSATION,  # some data sets have `chosen` and `rejected` beside a complete conversation
    "alpaca": _CONVERSATION | _THOUGHTS | {"context": "call it input"},
    "text": _CONVERSATION,
    "tokens": {},  # what is rendered already has all of that in it
}
_MESSAGES = _WEIGHTS | _keys("train train_on_turn training loss train_detail training_detail", AS_LOSS_MASK)
_TURNS = _MESSAGES | _MEDIA | _THOUGHTS | _keys("tool_calls tool_call_id function_call", AS_MESSAGES)


def check_record(record: Mapping[str, Any], format: str) -> None:
    """Raise UserError for a key of a record of `format` that nothing reads.

    A record may hold its sample in several shapes: keys that belong to one that was not chosen are passed over.
    """
    shapes = {
        shape for shape in ("input_ids", "messages", "conversations", "instruction") if not _is_empty(record.get(shape))
    }
    refused = _WEIGHTS | _MEDIA
    if format != "text" or not shapes - {"input_ids"}:
        refused |= _RECORDS[format]
    read = {"tokens": "loss_mask", "alpaca": "system"}.get(format)
    has_own_tokens = format == "tokens" or "input_ids" not in shapes
    for key, value in record.items():
        remedy = refused.get(key) or (_remedy_of_tokens(key) if has_own_tokens else None)
        is_usual = key in _WEIGHTS and value == 1
        if remedy is not None and key != read and not is_usual and not _is_empty(value):
            raise UserError(_message(key, remedy))


def check_turn(turn: Mapping[str, Any], number: int, role: str, *, in_messages: bool) -> None:
    """Raise UserError for a key of turn `number` that nothing reads. The chat template reads those of `messages`.

    The weight 1 of an assistant's turn, and 0 of any other, say what is done anyway.
    """
    refused = _MESSAGES if in_messages else _TURNS
    for key, value in turn.items():
        remedy = refused.get(key) or (AS_LOSS_MASK if _MASK.fullmatch(key) else None)
        is_usual = key in _MESSAGES and value == (role == "assistant")
        if remedy is not None and not is_usual and not _is_empty(value):
            raise UserError(f"turn {number}: {_message(key, remedy)}")


def _remedy_of_tokens(key: str) -> str | None:
    return _TOKENS.get(key) or (AS_LOSS_MASK if _MASK.fullmatch(key) else None)


def _message(key: str, remedy: str) -> str:
    return f"the key {key} changes what is trained on, and nothing reads it: {remedy}"


def _is_empty(value: Any) -> bool:
    """Also a dictionary of empty values, which a data set has where a row is without them."""
    if isinstance(value, Mapping):
        return all(_is_empty(one) for one in value.values())
    return value is None or value in ("", [])
