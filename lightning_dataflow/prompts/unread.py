"""Keys that change what a record means and are not supported. A record with one is refused, not trained without it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning_dataflow.contracts import UserError

RENDERED = "remove it to train without, or render the conversation yourself and give input_ids and loss_mask"
AS_LOSS_MASK = "give input_ids with a loss_mask that says the same, and remove it"
UNPACKED = "give one sample a record, without packing, and remove it"
TEXT_ONLY = "only text is trained on, so remove it, or the record"
ALL_ALIKE = "all supervised tokens count alike, so remove it, or the record"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
EMPTY_TEXTS = ("", "[]", "{}", "null")
TRAIN_FLAGS = ("weight", "train", "train_on_turn", "training", "loss")
"""Keys of a turn that say whether it is trained on."""

_MASK = re.compile(r"(?!special_tokens_)(\w+_)?masks?")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def _keys(names: str, remedy: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), remedy)


_WEIGHTS = _keys("weight weights loss_weight loss_weights sample_weight token_weights", ALL_ALIKE)
_MEDIA = _keys("image images video videos audio audios pixel_values", TEXT_ONLY)
_TOKENS = {
    "labels": "give it with input_ids, or remove it",
    **_keys("attention_mask position_ids segment_ids seq_lengths cu_seqlens", UNPACKED),
}
_FLAGS = dict.fromkeys(TRAIN_FLAGS, AS_LOSS_MASK) | {"weight": ALL_ALIKE}
_USUALLY_ONES = {*_WEIGHTS, "attention_mask"}
_TURNS = _keys(
    "history documents chat_template_kwargs enable_thinking reasoning_effort system system_prompt",
    "give it in the record, beside its turns",
)
_TURNS |= _keys("train_detail training_detail", AS_LOSS_MASK)
_OF_TURNS = _WEIGHTS | _MEDIA | _TURNS | _FLAGS
_CONVERSATION = _keys(
    "system system_prompt system_message history tools available_tools functions documents chat_template_kwargs "
    "enable_thinking reasoning_effort",
    RENDERED,
)
_RECORDS = {
    "alpaca": {"context": "call it input"},
    "text": _CONVERSATION,
    "completion": _CONVERSATION,
}
MASKS = ("loss_mask", "assistant_masks", "assistant_mask", "completion_mask")
_READ_WITH_TOKENS = {*MASKS, "labels", "attention_mask", "position_ids"}


def check_record(record: Mapping[str, Any], format: str, *, is_conversation: bool) -> None:
    """Raise UserError for a key of a record of `format` that would change what is trained on and is not supported.

    A record may hold its sample in several shapes: keys that belong to one that was not chosen are passed over. So are
    values that say what is done anyway: no padding, weights of 1.
    """
    shapes = {
        shape for shape in ("input_ids", "messages", "conversations", "instruction") if not is_empty(record.get(shape))
    }
    refused = _WEIGHTS | _MEDIA
    if format == "alpaca" or (not is_conversation and (format != "text" or not shapes - {"input_ids"})):
        refused |= _RECORDS.get(format, {})
    has_own_tokens = format == "tokens" or "input_ids" not in shapes
    if has_own_tokens:
        refused |= _TOKENS
    read = _READ_WITH_TOKENS if format == "tokens" else ()
    for key, value in record.items():
        name = snake_case(key)
        remedy = refused.get(name) or (_remedy_of_mask(name, value) if has_own_tokens else None)
        if (
            name in REASONING_KEYS
            and format not in ("alpaca", "tokens")
            and isinstance(value, str)
            and " " in value.strip()
        ):
            remedy = "give it in the assistant's message"
        if name == "kto_tag" or (name == "label" and format == "completion"):
            remedy = "it says that the answer is a bad one, so remove the record" if value is False else None
        is_usual = name in _USUALLY_ONES and is_all(value, 1)
        if remedy is not None and name not in read and not is_usual and not is_empty(value):
            raise UserError(_message(key, remedy))


def check_question(record: Mapping[str, Any]) -> None:
    """Raise UserError if a question is about more than its text."""
    for key, value in record.items():
        if snake_case(key) in _MEDIA and not is_empty(value):
            raise UserError(f"the key {key} changes what is asked and is not supported: remove it, or the record")


def check_turn(turn: Mapping[str, Any], role: str) -> None:
    """Raise UserError for a key of a turn that would change what is trained on and is not supported.

    Flags say whether an assistant's turn is trained on; others never are.
    """
    for key, value in turn.items():
        name = snake_case(key)
        remedy = _OF_TURNS.get(name) or _remedy_of_mask(name, value)
        if name in TRAIN_FLAGS:
            is_read = is_all(value, 0) or (role == "assistant" and is_all(value, 1))
        else:
            is_read = name in _WEIGHTS and is_all(value, 1)
        if remedy is not None and not is_read and not is_empty(value):
            raise UserError(_message(key, remedy))


def as_list(value: Any) -> Any:
    """An array, which rows of data sets may hold, as a list; anything else as it is. Arrays have no truth value."""
    return value.tolist() if hasattr(value, "tolist") else value


def snake_case(key: str) -> str:
    """`lossMask` and `loss_mask` are the same key."""
    return _HUMP.sub("_", key).lower()


def is_empty(value: Any) -> bool:
    """Data sets fill missing structs with nulls, also within lists. Some columns hold JSON as text."""
    return all(leaf is None or (isinstance(leaf, str) and leaf in EMPTY_TEXTS) for leaf in _leaves(value))


def value_of(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first value of these keys that is not empty, whatever their spelling; None if there is none."""
    values = (value for key, value in record.items() if snake_case(key) in names and not is_empty(value))
    return as_list(next(values, None))


def _remedy_of_mask(name: str, value: Any) -> str | None:
    return AS_LOSS_MASK if _MASK.fullmatch(name) and _is_flags(value) else None


def _message(key: str, remedy: str) -> str:
    return f"the key {key} changes what is trained on and is not supported: {remedy}"


def _is_flags(value: Any) -> bool:
    """Numbers, also in lists or as text, as masks of tokens are. A privacy_mask has words instead."""
    return not any(char.isalpha() for leaf in _leaves(value) if isinstance(leaf, str) for char in leaf)


def is_all(value: Any, wanted: int) -> bool:
    """`wanted` itself, or a list of nothing else."""
    return all(leaf == wanted for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    """What lists and dictionaries hold, in no particular order. Nesting may be deeper than Python's stack."""
    rest = [value]
    while rest:
        value = as_list(rest.pop())
        if isinstance(value, Mapping):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)
        else:
            yield value
