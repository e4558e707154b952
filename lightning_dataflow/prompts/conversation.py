"""The shapes of records that people have, brought to one: a list of `{"role", "content"}` messages, text, or ids."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dataflow.contracts import UserError

FORMATS = ("auto", "sharegpt", "messages", "alpaca", "text", "tokens")
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

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages to render with the chat template; the assistant's tokens are supervised."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """Text without roles; every token is supervised."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids with their own mask; every token is supervised when the record has none."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


def detect_format(record: Mapping[str, Any]) -> str | None:
    """The format of one record by its keys, or None."""
    if "input_ids" in record:
        return "tokens"
    if "conversations" in record:
        return "sharegpt"
    if "messages" in record:
        return "messages"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if "text" in record:
        return "text"
    return None


def normalise(record: Mapping[str, Any], format: str, where: str) -> Conversation | PlainText | Tokens:
    """Read one record. Raises UserError naming `where` when it has not the keys of `format`."""
    detected = detect_format(record) if format == "auto" else format
    if detected is None:
        raise UserError(
            f"{where}: keys {sorted(record)} fit no format; expected conversations (from/value), messages "
            "(role/content), instruction/output, text or input_ids"
        )
    try:
        return _READERS[detected](record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{where}: not a record of format {detected} ({error!r}); mend it or set data.format") from error


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    messages = []
    for turn in record["conversations"]:
        role = SHAREGPT_ROLES[turn["from"]] if "from" in turn else turn["role"]
        messages.append({"role": role, "content": _text(turn["value"] if "value" in turn else turn["content"])})
    return Conversation(messages=tuple(messages))


def _messages(record: Mapping[str, Any]) -> Conversation:
    messages = []
    for message in record["messages"]:
        kept = {key: value for key, value in message.items() if value is not None}
        if "tool_calls" not in kept:
            kept["content"] = _text(kept["content"])
        messages.append({"role": kept.pop("role"), **kept})
    return Conversation(messages=tuple(messages))


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    question = _text(record["instruction"])
    if record.get("input"):
        question = f"{question}\n\n{_text(record['input'])}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(record["output"])}]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": _text(record["system"])})
    return Conversation(messages=tuple(messages))


def _plain_text(record: Mapping[str, Any]) -> PlainText:
    return PlainText(text=_text(record["text"]))


def _tokens(record: Mapping[str, Any]) -> Tokens:
    ids = tuple(int(token) for token in record["input_ids"])
    mask = tuple(int(bool(flag)) for flag in record.get("loss_mask") or [1] * len(ids))
    if len(mask) != len(ids):
        raise ValueError(f"{len(ids)} input_ids, {len(mask)} loss_mask entries")
    return Tokens(input_ids=ids, loss_mask=mask)


def _text(value: Any) -> str:
    if isinstance(value, list):  # OpenAI content parts
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


_READERS: dict[str, Callable[[Mapping[str, Any]], Conversation | PlainText | Tokens]] = {
    "sharegpt": _sharegpt,
    "messages": _messages,
    "alpaca": _alpaca,
    "text": _plain_text,
    "tokens": _tokens,
}
