"""Which text of a conversation is supervised: what the engine will be asked to produce.

For each assistant turn the prompt is the rendering of the messages before it, with the generation prompt. The answer is
what the rendering with the finished turn adds, up to and including the token that ends the turn. Where one rendering
contains all prompts and answers of a conversation, it is one sample. Else each turn is a sample of its own, as served.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_dataflow.prompts.messages import Message
from lightning_dataflow.prompts.records import Conversation
from lightning_dataflow.prompts.template import ChatTemplate, Unusable, common_length

TURNS = ("auto", "all", "last")
THOUGHT_ENDS = ("</think>", "[/THINK]", "<|END_THINKING|>", "</thinking>", "</thought>", "</seed:think>", "<channel|>")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An assistant's turn.

    Attributes:
        index: of its message, from 0.
        text: rendering up to the end of the turn; empty if the turn is not supervised.
        start: the answer is text[start:].
        reason: why the turn is not supervised.
    """

    index: int
    text: str = ""
    start: int = 0
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class RenderedSample:
    """Text with supervised spans of characters, [start, end).

    Attributes:
        turn: index of the message that it teaches; None for all turns of the conversation.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    turn: int | None = None


def find_turns(template: ChatTemplate, conversation: Conversation) -> list[Turn]:
    """All assistant turns of the conversation, each with the reason if it is not supervised.

    Raises:
        Unusable: there is none, or the template drops something that the conversation holds.
    """
    messages = conversation.messages
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not indices:
        raise Unusable("no assistant turn")
    check_nothing_is_dropped(template, conversation)
    return [_find_turn(template, conversation, index) for index in indices]


def to_samples(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[Turn], mode: str = "auto"
) -> list[RenderedSample]:
    """The samples that teach the supervised turns.

    Args:
        mode: `auto` for one sample where one rendering contains all turns; `all` for a sample for each turn; `last` for the
            last turn only.
    """
    supervised = [turn for turn in turns if turn.reason is None]
    if mode == "auto" and supervised:
        whole = template.render(conversation, conversation.messages)
        if supervised[-1].text.startswith(whole):  # and ends with a token that the next message would begin with
            whole = supervised[-1].text
        if all(whole.startswith(turn.text) for turn in supervised):
            return [RenderedSample(text=whole, spans=tuple((turn.start, len(turn.text)) for turn in supervised))]
    if mode == "last":
        supervised = [turn for turn in supervised if turn is turns[-1]]
    is_split = len(turns) > 1
    return [
        RenderedSample(text=turn.text, spans=((turn.start, len(turn.text)),), turn=turn.index if is_split else None)
        for turn in supervised
    ]


def check_nothing_is_dropped(template: ChatTemplate, conversation: Conversation) -> None:
    """Raise Unusable if tools, documents, tool calls or messages have no effect on the rendering."""
    if template.dropped_role in [message["role"] for message in conversation.messages]:
        raise Unusable(f"the chat template drops the content of role {template.dropped_role}")
    changes: list[tuple[str, Conversation]] = []
    if conversation.tools:
        changes.append(("tools", replace(conversation, tools=())))
    if conversation.documents:
        changes.append(("documents", replace(conversation, documents=())))
    if any(message.get("tool_calls") for message in conversation.messages):
        changes.append(("tool calls", replace(conversation, messages=tuple(map(_without_calls, conversation.messages)))))
    for index, message in enumerate(conversation.messages):
        if message["role"] not in ("user", "assistant") and message.get("content"):
            other = _replace_message(conversation, index, {**message, "content": f"a{message['content']}"})
            changes.append((f"message of role {message['role']}", other))
    if changes:
        rendered = template.render(conversation, conversation.messages)
        for name, changed in changes:
            if _renders_as(template, changed, changed.messages, rendered):
                raise Unusable(f"the chat template drops the {name}")


def _renders_as(template: ChatTemplate, changed: Conversation, messages: Sequence[Message], rendered: str) -> bool:
    """Whether a change has no effect. It has one if the template refuses what was changed."""
    try:
        return template.render(changed, messages) == rendered
    except Unusable:
        return False


def _without_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _find_turn(template: ChatTemplate, conversation: Conversation, index: int) -> Turn:
    if index in conversation.unsupervised:
        return Turn(index=index, reason="the record excludes this turn from training")
    if index == 0:
        return Turn(index=index, reason="the conversation begins with it, so it answers nothing")
    try:
        finished = template.render(conversation, conversation.messages[: index + 1])
        for name, message in _poorer(conversation.messages[index]):
            changed = _replace_message(conversation, index, message)
            if _renders_as(template, changed, changed.messages[: index + 1], finished):
                raise Unusable(f"the chat template drops the turn's {name}")
        start = _start_of_answer(template, conversation, index, finished)
        text = finished[: _end_of_turn(finished.removesuffix(template.constant_prompt), start, template.turn_ends)]
        if _is_empty(text[start:], template.turn_ends):
            raise Unusable("the turn is empty")
        if not text.endswith(template.turn_ends):
            text += _stop_in_next_header(template, conversation, index)
    except Unusable as reason:
        return Turn(index=index, reason=str(reason))
    return Turn(index=index, text=text, start=start)


def _start_of_answer(template: ChatTemplate, conversation: Conversation, index: int, finished: str) -> int:
    """Where the answer begins in `finished`, the rendering that ends with turn `index`."""
    messages = conversation.messages[:index]
    prompt = template.render(conversation, messages, prompt=True)
    is_prefix = finished.startswith(prompt)
    if is_prefix and template.generation_prompt and prompt.endswith(template.generation_prompt):
        return len(prompt)
    without = template.render(conversation, messages)
    if is_prefix and without != prompt:
        return len(prompt)
    shared = common_length(prompt, finished)
    has_constant_end = without == prompt and finished.endswith(prompt[shared:])
    if shared < common_length(without, prompt) and not has_constant_end:
        raise Unusable("the chat template renders earlier messages differently once the turn is finished")
    content = min(
        common_length(finished, template.render(conversation, [*messages, {"role": "assistant", "content": other}]))
        for other in ("bc", "de")
    )
    if without == prompt:  # no generation prompt: the header is template text, unless the model writes its white space
        return len(prompt) if finished[shared:content].isspace() and is_prefix else content
    return min(shared, content)


def _end_of_turn(finished: str, start: int, ends: Sequence[str]) -> int:
    """After the first of the end tokens that `finished` ends with; its length if there is none.

    White space and further tokens that the template writes after that token are never generated.
    """
    end = None
    rest = finished.rstrip()
    while len(rest) > start and (token := next((token for token in ends if rest.endswith(token)), None)):
        end = len(rest)
        rest = rest[: -len(token)].rstrip()
    return len(finished) if end is None else end


def _is_empty(answer: str, ends: Sequence[str]) -> bool:
    """Nothing but white space and the end of the turn."""
    for token in ends:
        answer = answer.replace(token, "")
    return not answer.strip()


def _stop_in_next_header(template: ChatTemplate, conversation: Conversation, index: int) -> str:
    """The token at which the engine stops where the next message begins with it and the turn has no end of its own.

    Messages are rendered without reasoning, which templates drop once a user's message follows.
    """
    before = [_without_reasoning(message) for message in conversation.messages[: index + 1]]
    later: Sequence[Message] = conversation.messages[index + 1 : index + 2]
    try:
        turn = template.render(conversation, before)
        following = template.render(conversation, [*before, *(later or [_next_message(before[-1])])])
    except Unusable:
        return ""
    rest = following[len(turn) :] if following.startswith(turn) else ""
    return next((stop for stop in template.stops if rest.startswith(stop)), "")


def _next_message(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return {"role": "user", "content": "a"}
    return {"role": "tool", "content": "a", "tool_call_id": calls[0].get("id"), "name": calls[0]["function"]["name"]}


def _poorer(message: Message) -> Iterator[tuple[str, Message]]:
    """The message without each part of it that templates may drop."""
    if (without := _without_reasoning(message)) != message:
        yield "reasoning", without
    calls = message.get("tool_calls") or []
    if calls and (message.get("content") or "").strip():
        yield "text", {**message, "content": ""}
    if len(calls) > 1:
        yield "further tool calls", {**message, "tool_calls": calls[:1]}


def _without_reasoning(message: Message) -> Message:
    without = {key: value for key, value in message.items() if key != "reasoning_content"}
    content = message.get("content")
    for thought_end in THOUGHT_ENDS if isinstance(content, str) else ():
        without["content"] = without["content"].rpartition(thought_end)[2]
    return without


def _replace_message(conversation: Conversation, index: int, message: dict[str, Any]) -> Conversation:
    messages: list[Message] = list(conversation.messages)
    messages[index] = message
    return replace(conversation, messages=tuple(messages))
