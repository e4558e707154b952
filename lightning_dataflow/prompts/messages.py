"""Messages and tools of conversations, in the shape that chat templates read."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.unread import REASONING_KEYS, TRAIN_FLAGS, as_list, check_turn, is_all, is_empty, snake_case

Message = dict[str, Any]

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
    "function_response": "tool",
}
FUNCTION_CALL = "function_call"
TOOL_KEYS = ("tools", "available_tools", "functions")
ROLES = {name: role for name, role in SHAREGPT_ROLES.items() if role in ("user", "assistant")}
"""Other names of these two, which no engine is asked for. Roles that are not here are for the template."""
TEMPLATE_KEYS = ("tool_call_id", "name")
READ_KEYS = {"from", "value", "role", "content", "tool_calls", FUNCTION_CALL, *REASONING_KEYS, *TOOL_KEYS, *TRAIN_FLAGS}
THOUGHT_PARTS = ("thinking", "reasoning")


@dataclass(frozen=True, kw_only=True)
class ReadMessage:
    """A turn as a message.

    Attributes:
        message: an assistant's reasoning is under `reasoning_content`.
        tools: that the turn lists, as ChatGLM's system turns do.
        is_supervised: false if the turn says that it is not to be learnt.
    """

    message: Message
    tools: Any = None
    is_supervised: bool = True


def read_message(turn: Mapping[str, Any], number: int) -> ReadMessage:
    """A turn with `from` and `value`, or with `role` and `content`. A message's other keys are kept for the template.

    Raises:
        UserError: a key that is not supported, or tool calls of another shape.
        KeyError, TypeError: role or content are missing or of another type.
    """
    speaker = turn.get("from")
    is_call = speaker == FUNCTION_CALL
    role = "assistant" if is_call else SHAREGPT_ROLES[speaker] if speaker is not None else _role(turn["role"])
    content = as_list(turn.get("content") if turn.get("value") is None else turn["value"])
    check_turn(turn, number, role)
    keys = {snake_case(key): as_list(value) for key, value in turn.items() if not is_empty(value)}
    calls = _tool_calls(content if is_call else keys.get("tool_calls", keys.get(FUNCTION_CALL)))
    message: Message = {"role": role, "content": _content(None if is_call else content, may_be_null=bool(calls))}
    if calls:
        message["tool_calls"] = calls
    if reasoning := next((keys[key] for key in REASONING_KEYS if key in keys), None) or _thoughts(content):
        message["reasoning_content"] = to_text(reasoning)
    is_message = speaker is None
    message |= {key: value for key, value in keys.items() if key not in READ_KEYS and (is_message or key in TEMPLATE_KEYS)}
    return ReadMessage(
        message=message,
        tools=next((keys[key] for key in TOOL_KEYS if key in keys), None),
        is_supervised=not any(is_all(keys[flag], 0) for flag in TRAIN_FLAGS if flag in keys),
    )


def openai_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools as `{"type": "function", "function": {…}}`, from a list of those or of bare functions, also as JSON text.

    Raises UserError for anything else.
    """
    tools = as_json(value)
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError("tools is not a list of functions: give OpenAI's list, or its JSON as text")
    return tuple(dict(tool) if "type" in tool and "name" not in tool else _function(tool) for tool in tools)


def as_json(value: Any) -> Any:
    """Columns of data sets often hold JSON as text. Raises UserError for text that is not JSON."""
    value = as_list(value)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{reprlib.repr(value)} is not JSON: correct it, or give a list") from error


def to_text(value: Any) -> str:
    """Text, also from OpenAI's list of content parts. Raises TypeError for anything else."""
    value = as_list(value)
    if isinstance(value, list):
        value = "".join(part if isinstance(part, str) else _text_of_part(part) for part in value)
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _content(value: Any, *, may_be_null: bool) -> str | None:
    """Templates ask whether the content of a message with tool calls is null."""
    return None if value is None and may_be_null else to_text(value)


def _text_of_part(part: Mapping[str, Any]) -> str:
    if part.get("type", "text") in THOUGHT_PARTS:
        return ""  # read as the message's reasoning
    if part.get("type", "text") not in ("text", "input_text", "output_text"):
        raise UserError(f"a content part of type {part['type']}: only text is trained on, so remove it, or the record")
    return to_text(part["text"])


def _thoughts(content: Any) -> str:
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return "".join(to_text(part.get("thinking", part.get("text"))) for part in parts if part.get("type") in THOUGHT_PARTS)


def _role(name: Any) -> Any:
    return ROLES.get(name, name) if isinstance(name, str) else name


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    calls = as_json(value) or []
    calls = [calls] if isinstance(calls, Mapping) else calls
    return [_tool_call(call) for call in calls if not is_empty(call)]


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """With arguments as an object, as engines decode them before rendering."""
    function = dict(call["function"] if call.get("function") else call)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = as_json(arguments) if arguments.strip() else {}
    named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": named}


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str):
        raise UserError(f"the tool {reprlib.repr(dict(tool))} has no name: give OpenAI's list of tools")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
