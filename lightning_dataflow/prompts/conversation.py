"""Reads records of five formats as a list of `{"role", "content"}` messages, as text, or as token ids."""

import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.unread import check_record, check_turn

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "observation": "tool",
}

LARGEST_ID = 2**31 - 1

Message = dict[str, Any]
Messages = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids with their own mask; every token is supervised when the record has none."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


def detect_format(record: Mapping[str, Any]) -> str | None:
    """The format of a record by its keys, or None. In a data set, null stands for a key that the row does not have."""
    keys = {key for key, value in record.items() if value is not None}
    return next((name for name, (required, _) in READERS.items() if required <= keys), None)


def normalise(record: Mapping[str, Any], format: str, where: str) -> Messages | str | Tokens:
    """Read one record: messages to render with the chat template, text without roles, or token ids.

    Raises:
        UserError: keys are missing, a value has the wrong type, or a key is not supported; the message begins with `where`.
    """
    detected = detect_format(record) if format == "auto" else format
    if detected is None:
        raise UserError(
            f"{where}: keys {sorted(record)} fit no format; expected conversations (from/value), messages "
            "(role/content), instruction/output, text or input_ids"
        )
    try:
        _, read = READERS[detected]
        conversation = read(record)
        check_record(record, detected, _system(conversation))
        return conversation
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where}: not a record of format {detected} ({_show(error, repr)}); correct it or set data.format"
        ) from error


def _system(read: Messages | str | Tokens) -> Any:
    """The content of the first turn if that is a system prompt, else None."""
    first = read[0] if isinstance(read, tuple) and read else {}
    return first.get("content") if first.get("role") == "system" else None


def _sharegpt(record: Mapping[str, Any]) -> Messages:
    messages = []
    for number, turn in enumerate(record["conversations"], start=1):
        role = turn["role"] if turn.get("from") is None else SHAREGPT_ROLES[turn["from"]]
        check_turn(turn, number, role, in_messages=False)
        messages.append(
            {"role": role, "content": _text(turn.get("content") if turn.get("value") is None else turn["value"])}
        )
    return tuple(messages)


def _messages(record: Mapping[str, Any]) -> Messages:
    messages = []
    for number, message in enumerate(record["messages"], start=1):
        check_turn(message, number, message["role"], in_messages=True)
        kept = {key: value for key, value in message.items() if value is not None}
        if "tool_calls" not in kept:
            kept["content"] = _text(kept["content"])
        messages.append({"role": kept.pop("role"), **kept})
    return tuple(messages)


def _alpaca(record: Mapping[str, Any]) -> Messages:
    question = _text(record["instruction"])
    if record.get("input"):
        question = f"{question}\n\n{_text(record['input'])}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(record["output"])}]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": _text(record["system"])})
    return tuple(messages)


def _plain_text(record: Mapping[str, Any]) -> str:
    return _text(record["text"])


def _tokens(record: Mapping[str, Any]) -> Tokens:
    ids, mask = token_ids(record["input_ids"]), record.get("loss_mask")
    if mask is None:
        return Tokens(input_ids=ids, loss_mask=(1,) * len(ids))
    if not isinstance(mask, list | tuple):
        raise UserError(f"loss_mask is {_show(mask)}: give a list with 0 or 1 for each of the input_ids")
    if len(mask) != len(ids):
        raise UserError(f"{len(ids)} input_ids, {len(mask)} loss_mask entries: give 0 or 1 for each of the input_ids")
    for index, flag in enumerate(mask):
        if flag not in (0, 1):
            raise UserError(f"loss_mask[{index}] is {_show(flag)}: give 1 where a token is supervised, else 0")
    return Tokens(input_ids=ids, loss_mask=tuple(int(flag) for flag in mask))


def token_ids(value: Any) -> tuple[int, ...]:
    """`input_ids` of a record. Raises UserError unless they are a list of token ids."""
    if not isinstance(value, list | tuple):
        raise UserError(f"input_ids is {_show(value)}: give a list of token ids")
    for index, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= LARGEST_ID:
            raise UserError(f"input_ids[{index}] is {_show(token)}: token ids are integers from 0 to {LARGEST_ID}")
    return tuple(value)


def _show(value: Any, shorten: Callable[[Any], str] = reprlib.repr) -> str:
    """`value` on one short line. Python refuses to print integers of thousands of digits."""
    try:
        return " ".join(shorten(value).split())
    except ValueError:
        return f"a number of more than {sys.get_int_max_str_digits()} digits"


def _text(value: Any) -> str:
    if isinstance(value, list):  # OpenAI content parts
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


READERS: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Messages | str | Tokens]]] = {
    "tokens": ({"input_ids"}, _tokens),
    "sharegpt": ({"conversations"}, _sharegpt),
    "messages": ({"messages"}, _messages),
    "alpaca": ({"instruction", "output"}, _alpaca),
    "text": ({"text"}, _plain_text),
}
"""The keys that records of each format have, and how to read them. A record that fits several formats is of the first."""
FORMATS = ("auto", *READERS)
