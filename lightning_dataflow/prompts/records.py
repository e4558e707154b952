"""Reads records of seven formats as conversations, as text, or as token ids."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.messages import (
    TOOL_KEYS,
    Message,
    ReadMessage,
    as_json,
    openai_tools,
    read_message,
    to_text,
)
from lightning_dataflow.prompts.tokens import Tokens, read_tokens, show
from lightning_dataflow.prompts.unread import REASONING_KEYS, as_list, check_record, is_empty, snake_case, value_of

ARGUMENT_KEYS = ("enable_thinking", "reasoning_effort")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What the chat template renders. The assistant's turns are supervised.

    Attributes:
        messages: each with `role` and `content`; an assistant's also with `tool_calls`, `reasoning_content`, …
        tools: in OpenAI's shape.
        arguments: further variables of the template.
        unsupervised: indices of assistant's messages that are not trained on.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    documents: tuple[dict[str, Any], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unsupervised: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """Text without roles. Its tokens are supervised from the character `start` on."""

    text: str
    start: int = 0


Sample = Conversation | PlainText | Tokens


def detect_format(record: Mapping[str, Any]) -> str | None:
    """The format of a record by its keys, or None. Rows of data sets have nulls or empty values for keys that they lack."""
    keys = {key for key, value in record.items() if value is not None and not (key == "chosen" and is_empty(value))}
    filled = {key for key in keys if isinstance(record[key], str) or not is_empty(record[key])}
    return next((name for given in (filled, keys) for name, (required, _) in READERS.items() if required <= given), None)


def normalise(record: Mapping[str, Any], format: str, where: str) -> Sample:
    """Read one record.

    Raises:
        UserError: keys are missing, a value has the wrong type, or a key is not supported; the message begins with `where`.
    """
    detected = detect_format(record) if format == "auto" else format
    if detected is None:
        raise UserError(
            f"{where}: keys {sorted(record)} fit no format; expected conversations (from/value), messages (role/content), "
            "chosen, prompt/completion, instruction/output, text or input_ids"
        )
    try:
        _, read = READERS[detected]
        sample = read(record)
        check_record(record, detected, is_conversation=isinstance(sample, Conversation))
        return sample
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not a record of format {detected} ({show(error, repr)}); correct it or set data.format"
        ) from error


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    return _with_chosen(record, _turns(record["conversations"], "conversations"))


def _messages(record: Mapping[str, Any]) -> Conversation:
    return _with_chosen(record, _turns(record["messages"], "messages"))


def _preference(record: Mapping[str, Any]) -> Conversation:
    prompt = as_list(record.get("prompt"))
    if is_empty(prompt):
        return _with_chosen(record, [])
    return _with_chosen(
        record, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt, "prompt")
    )


def _with_chosen(record: Mapping[str, Any], turns: list[Any]) -> Conversation:
    """The chosen side of a pair. It may hold the whole conversation, or the answer to `turns` alone."""
    chosen = as_list(record.get("chosen"))
    if is_empty(chosen):
        return to_conversation(record, turns)
    answer = [{"role": "assistant", "content": chosen}] if isinstance(chosen, str) else _turns(chosen, "chosen")
    first = read_message(answer[0], 1).message
    if first["role"] != "assistant":
        return to_conversation(record, answer)
    if not turns:
        raise UserError("chosen begins with an answer and there is no prompt: give the conversation as a list of messages")
    last = read_message(turns[-1], len(turns)).message
    if last["role"] == "assistant" and last != first:
        raise UserError("the turns end with an answer that is not the chosen one: keep one")
    return to_conversation(record, turns if last == first else [*turns, *answer])


def _completion(record: Mapping[str, Any]) -> Conversation | PlainText:
    prompt, completion = as_list(record["prompt"]), as_list(record["completion"])
    if isinstance(prompt, str) and isinstance(completion, str):
        return PlainText(text=prompt + completion, start=len(prompt))
    question, answer = _turns(prompt, "prompt"), _turns(completion, "completion")
    return to_conversation(record, [*question, *answer], first_supervised=len(question))


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    question = to_text(record["instruction"], "instruction")
    if not is_empty(record.get("input")):
        question = f"{question}\n\n{to_text(record['input'], 'input')}"
    answer: Message = {"role": "assistant", "content": to_text(record["output"], "output")}
    answer |= {key: value for key, value in record.items() if snake_case(key) in REASONING_KEYS}
    return to_conversation(record, [{"role": "user", "content": question}, answer])


def _plain_text(record: Mapping[str, Any]) -> PlainText:
    return PlainText(text=to_text(record["text"], "text"))


def to_conversation(record: Mapping[str, Any], turns: Any, first_supervised: int = 0) -> Conversation:
    """`turns` of either shape, with what else the record says of its conversation: system prompt, history, tools, ….

    Args:
        first_supervised: earlier ones of `turns` are not trained on.
    """
    turns = _turns(turns, "turns")
    read = [read_message(turn, number) for number, turn in enumerate(turns, start=1)]
    history = [read_message(turn, number) for number, turn in enumerate(_history(record), start=1)]
    read = _with_system(record, [*history, *read])
    if first_supervised:
        first_supervised += len(read) - len(turns)
    tools = [value_of(record, TOOL_KEYS), *(message.tools for message in read)]
    given = [openai_tools(value) for value in tools if not is_empty(value)]
    if any(other != given[0] for other in given[1:]):
        raise UserError("the record has two lists of tools that differ: keep one")
    return Conversation(
        messages=tuple(message.message for message in read),
        tools=given[0] if given else (),
        documents=tuple(as_json(value_of(record, ("documents",)) or (), "documents")),
        arguments=_arguments(record),
        unsupervised=frozenset(
            index for index, message in enumerate(read) if not message.is_supervised or index < first_supervised
        ),
    )


def _with_system(record: Mapping[str, Any], read: list[ReadMessage]) -> list[ReadMessage]:
    """With the record's system prompt as the first message, unless the conversation begins with it."""
    system = value_of(record, SYSTEM_KEYS)
    if system is None:
        return read
    message = read_message({"role": "system", "content": to_text(system, "system")}, 1)
    if not read or read[0].message["role"] != "system":
        return [message, *read]
    if read[0].message["content"] != message.message["content"]:
        raise UserError(f"the system prompt of the record is not that of its first turn ({show(system)}): keep one")
    return read


def _history(record: Mapping[str, Any]) -> list[Message]:
    """Earlier turns: pairs of question and answer, or messages."""
    history = as_json(value_of(record, ("history",)) or [], "history")
    turns: list[Message] = []
    for entry in map(as_list, history):
        if isinstance(entry, Mapping):
            turns.append(dict(entry))
        else:
            question, answer = entry
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    given = as_json(value_of(record, ("chat_template_kwargs",)) or {}, "chat_template_kwargs")
    arguments = {str(key): value for key, value in given.items() if value is not None}
    named = {name: value_of(record, (name,)) for name in ARGUMENT_KEYS}
    return arguments | {name: value for name, value in named.items() if value is not None}


def _turns(value: Any, name: str) -> list[Any]:
    turns = as_json(value, name)
    if not isinstance(turns, Mapping | list | tuple):
        raise UserError(f"{name} is {show(value)}: give a list of messages")
    return [turns] if isinstance(turns, Mapping) else list(turns)


READERS: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Sample]]] = {
    "tokens": ({"input_ids"}, read_tokens),
    "sharegpt": ({"conversations"}, _sharegpt),
    "messages": ({"messages"}, _messages),
    "preference": ({"chosen"}, _preference),
    "completion": ({"prompt", "completion"}, _completion),
    "alpaca": ({"instruction", "output"}, _alpaca),
    "text": ({"text"}, _plain_text),
}
"""The keys that records of each format have, and how to read them. A record that fits several formats is of the first."""
FORMATS = ("auto", *READERS)
