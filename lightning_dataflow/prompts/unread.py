"""Keys that change what a record means and are not supported. A record with one is refused, not trained without it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_dataflow.contracts import UserError

RENDERED = "remove it to train without, or render the conversation yourself and give input_ids and loss_mask"
AS_MESSAGES = "give the conversation as `messages`, whose keys the chat template reads, or remove it to train without"
AS_LOSS_MASK = "give input_ids with a loss_mask that says the same, and remove it"
UNPACKED = "give one sample a record, without padding, and remove it"
TEXT_ONLY = "only text is trained on, so remove it, or the record"
ALL_ALIKE = "all supervised tokens count alike, so remove it, or the record"
AS_QUESTION = "remove it to ask without, or render the prompt yourself and give input_ids"
EMPTY_TEXTS = ("", "[]", "{}", "null")

_MASK = re.compile(r"(?!special_tokens_)(\w+_)?masks?")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def _keys(names: str, remedy: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), remedy)


_SYSTEM = _keys("system system_prompt system_message", "give it as the first turn, with the role system")
_WEIGHTS = _keys("weight weights loss_weight loss_weights sample_weight token_weights", ALL_ALIKE)
_MEDIA = _keys("image images video videos audio audios pixel_values", TEXT_ONLY)
_THOUGHTS = _keys("reasoning_content reasoning thinking thought", AS_MESSAGES)
_TOKENS = {
    "labels": "give loss_mask, 0 where a label is -100 and 1 elsewhere, and remove it",
    **_keys("attention_mask position_ids segment_ids seq_lengths cu_seqlens", UNPACKED),
}
_CONVERSATION = {
    **_SYSTEM,
    "history": "give the earlier turns in the conversation itself",
    **_keys("tools available_tools functions documents chat_template_kwargs enable_thinking", RENDERED),
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
_TURNS = _MESSAGES | _CONVERSATION | _MEDIA | _THOUGHTS | _keys("tool_calls tool_call_id function_call", AS_MESSAGES)
_USUALLY_ONES = {*_WEIGHTS, "attention_mask"}


def check_record(record: Mapping[str, Any], format: str, system: Any = None) -> None:
    """Raise UserError for a key of a record of `format` that would change what is trained on and is not supported.

    A record may hold its sample in several shapes: keys that belong to one that was not chosen are passed over. So are
    values that say what is done anyway: no padding, weights of 1, a system prompt that is `system`, the first turn's text.
    """
    shapes = {
        shape for shape in ("input_ids", "messages", "conversations", "instruction") if not _is_empty(record.get(shape))
    }
    refused = _WEIGHTS | _MEDIA
    if format != "text" or not shapes - {"input_ids"}:
        refused |= _RECORDS[format]
    has_own_tokens = format == "tokens" or "input_ids" not in shapes
    if has_own_tokens:
        refused |= _TOKENS
    read = {"tokens": "loss_mask", "alpaca": "system"}.get(format)
    for key, value in record.items():
        name = _snake_case(key)
        remedy = refused.get(name) or (_remedy_of_mask(name, value) if has_own_tokens else None)
        is_usual = (name in _USUALLY_ONES and _is_all(value, 1)) or (name in _SYSTEM and system == _as_list(value))
        if remedy is not None and key != read and not is_usual and not _is_empty(value):
            raise UserError(_message(key, remedy))


def check_turn(turn: Mapping[str, Any], number: int, role: str, *, in_messages: bool) -> None:
    """Raise UserError for a key of turn `number` that would change what is trained on and is not supported.

    The chat template reads all other keys of `messages`. The weight 1 of an assistant's turn, and 0 of any other, say what
    is done anyway.
    """
    refused = _MESSAGES if in_messages else _TURNS
    for key, value in turn.items():
        name = _snake_case(key)
        remedy = refused.get(name) or _remedy_of_mask(name, value)
        is_usual = name in _MESSAGES and _is_all(value, role == "assistant")
        if remedy is not None and not is_usual and not _is_empty(value):
            raise UserError(f"turn {number}: {_message(key, remedy)}")


def check_question(record: Mapping[str, Any]) -> None:
    """Raise UserError for a key of a record without token ids that would change what is asked and is not supported."""
    for key, value in record.items():
        if _snake_case(key) in _CONVERSATION and not _is_empty(value):
            raise UserError(_message(key, AS_QUESTION, "asked"))


def _as_list(value: Any) -> Any:
    """An array, which rows of data sets may hold, as a list; anything else as it is. Arrays have no truth value."""
    return value.tolist() if hasattr(value, "tolist") else value


def _snake_case(key: str) -> str:
    return _HUMP.sub("_", key).lower()


def _remedy_of_mask(name: str, value: Any) -> str | None:
    return AS_LOSS_MASK if _MASK.fullmatch(name) and _is_flags(value) else None


def _message(key: str, remedy: str, what: str = "trained on") -> str:
    return f"the key {key} changes what is {what} and is not supported yet: {remedy}"


def _is_flags(value: Any) -> bool:
    """Numbers, also in lists or as text, as masks of tokens are. A privacy_mask has words instead."""
    return not any(char.isalpha() for leaf in _leaves(value) if isinstance(leaf, str) for char in leaf)


def _is_all(value: Any, wanted: int) -> bool:
    """`wanted` itself, or a list of nothing else."""
    return all(leaf == wanted for leaf in _leaves(value))


def _is_empty(value: Any) -> bool:
    """Data sets fill missing structs with nulls, also within lists. Some columns hold JSON as text."""
    return all(leaf is None or (isinstance(leaf, str) and leaf in EMPTY_TEXTS) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    """What lists and dictionaries hold, in no particular order. Nesting may be deeper than Python's stack."""
    rest = [value]
    while rest:
        value = _as_list(rest.pop())
        if isinstance(value, Mapping):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)
        else:
            yield value
