"""Messages and tools of conversations, in the shape that chat templates read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.tokens import show
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
        is_supervised: false if the record excludes the turn from training.
    """

    message: Message
    tools: Any = None
    is_supervised: bool = True


def read_message(turn: Mapping[str, Any], number: int) -> ReadMessage:
    """A turn with `from` and `value`, or with `role` and `content`. A message's other keys are kept for the template.

    Raises UserError, which names the message by its number, for what is missing, of another type or not supported.
    """
    try:
        if not isinstance(turn, Mapping):
            raise UserError(f"a turn is {show(turn)}: give role and content, or from and value")
        return _read_message(turn)
    except UserError as error:
        raise UserError(f"message {number}: {error}") from error


def _read_message(turn: Mapping[str, Any]) -> ReadMessage:
    role = _role(turn)
    is_call = turn.get("from") == FUNCTION_CALL
    content = as_list(turn.get("content") if turn.get("value") is None else turn["value"])
    check_turn(turn, role)
    keys = {snake_case(key): as_list(value) for key, value in turn.items() if not is_empty(value)}
    calls = _tool_calls(content if is_call else keys.get("tool_calls", keys.get(FUNCTION_CALL)))
    message: Message = {"role": role, "content": _content(None if is_call else content, may_be_null=bool(calls))}
    if calls:
        message["tool_calls"] = calls
    if reasoning := next((keys[key] for key in REASONING_KEYS if key in keys), None) or _thoughts(content):
        message["reasoning_content"] = to_text(reasoning, "reasoning")
    is_message = turn.get("from") is None
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
    tools = as_json(value, "tools")
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError("tools is not a list of functions: give OpenAI's list, or its JSON as text")
    return tuple(dict(tool) if "type" in tool and "name" not in tool else _function(tool) for tool in tools)


def as_json(value: Any, name: str) -> Any:
    """Columns of data sets often hold JSON as text. Raises UserError, with the column's name, for text that is not JSON."""
    value = as_list(value)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is {show(value)}, which is not JSON: correct it, or give a list or an object") from error


def to_text(value: Any, name: str) -> str:
    """Text, also from OpenAI's list of content parts. Raises UserError, with the value's name, for anything else."""
    value = as_list(value)
    if isinstance(value, list):
        value = "".join(part if isinstance(part, str) else _text_of_part(part) for part in value)
    if not isinstance(value, str):
        raise UserError(f"{name} is {show(value)}: give text, or a list of parts with text")
    return value


def _content(value: Any, *, may_be_null: bool) -> str | None:
    """Templates ask whether the content of a message with tool calls is null."""
    return None if value is None and may_be_null else to_text(value, "content")


def _text_of_part(part: Any) -> str:
    if not isinstance(part, Mapping):
        raise UserError(f"a content part is {show(part)}: give text, or an object with type and text")
    if part.get("type", "text") in THOUGHT_PARTS:
        return ""  # read as the message's reasoning
    if part.get("type", "text") not in ("text", "input_text", "output_text"):
        raise UserError(f"a content part of type {part['type']}: only text is trained on, so remove it, or the record")
    return to_text(part.get("text"), "text of a content part")


def _thoughts(content: Any) -> str:
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    thoughts = [part.get("thinking", part.get("text")) for part in parts if part.get("type") in THOUGHT_PARTS]
    return "".join(to_text(thought, "thinking") for thought in thoughts)


def _role(turn: Mapping[str, Any]) -> str:
    speaker, role = turn.get("from"), turn.get("role")
    if speaker == FUNCTION_CALL:
        return "assistant"
    if speaker is not None:
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise UserError(f"from is {show(speaker)}: use {', '.join(SHAREGPT_ROLES)} or {FUNCTION_CALL}")
        return SHAREGPT_ROLES[speaker]
    if not isinstance(role, str):
        raise UserError(f"role is {show(role)}: give role and content, or from and value")
    return ROLES.get(role, role)


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    calls = as_json(value, "tool_calls") or []
    calls = [calls] if isinstance(calls, Mapping) else calls
    return [_tool_call(call) for call in calls if not is_empty(call)]


def _tool_call(call: Any) -> dict[str, Any]:
    """With arguments as an object, as engines decode them before rendering."""
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"tool_calls has {show(call)}: give the name and the arguments of a function")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = as_json(arguments, "arguments") if arguments.strip() else {}
    named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": named}


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str):
        raise UserError(f"the tool {show(dict(tool))} has no name: give OpenAI's list of tools")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
