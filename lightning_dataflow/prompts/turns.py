"""Which text of a conversation is supervised: what the engine will be asked to produce.

For each assistant turn the prompt is the rendering of the messages before it, with the generation prompt. The answer is
what the rendering with the finished turn adds, up to and including the token that ends the turn. Where one rendering
contains all prompts and answers of a conversation, it is one sample. Else each turn is a sample of its own, as served.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_dataflow.prompts.messages import Message
from lightning_dataflow.prompts.records import Conversation
from lightning_dataflow.prompts.template import ChatTemplate, Unusable, common_length

TURNS = ("auto", "all", "last")
THOUGHT_END = "</think>"


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
    if messages[0]["role"] == "assistant":
        raise Unusable("begins with an assistant turn")
    check_nothing_is_dropped(template, conversation)
    return [
        Turn(index=index, reason="the record says that it is not to be learnt")
        if index in conversation.unsupervised
        else _find_turn(template, conversation, index)
        for index in indices
    ]


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
    """Raise Unusable if tools, documents or a system prompt have no effect on the rendering."""
    changes: list[tuple[str, Conversation]] = []
    if conversation.tools:
        changes.append(("tools", replace(conversation, tools=())))
    if conversation.documents:
        changes.append(("documents", replace(conversation, documents=())))
    for index, message in enumerate(conversation.messages):
        if message["role"] not in ("user", "assistant") and message.get("content"):
            other = _replace_message(conversation, index, {**message, "content": f"a{message['content']}"})
            changes.append((f"message of role {message['role']}", other))
    if changes:
        rendered = template.render(conversation, conversation.messages)
        for name, changed in changes:
            if template.render(changed, changed.messages) == rendered:
                raise Unusable(f"the chat template drops the {name}")


def _find_turn(template: ChatTemplate, conversation: Conversation, index: int) -> Turn:
    try:
        finished = template.render(conversation, conversation.messages[: index + 1])
        if _drops_reasoning(template, conversation, index, finished):
            raise Unusable("the chat template drops the turn's reasoning")
        start = _start_of_answer(template, conversation, index, finished)
        end = _end_of_turn(finished, start, template.turn_ends)
        if not finished[start:end].strip():
            raise Unusable("the turn is empty")
    except Unusable as reason:
        return Turn(index=index, reason=str(reason))
    return Turn(index=index, text=finished[:end], start=start)


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
    if shared < common_length(without, prompt):
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


def _drops_reasoning(template: ChatTemplate, conversation: Conversation, index: int, finished: str) -> bool:
    message = conversation.messages[index]
    without = {key: value for key, value in message.items() if key != "reasoning_content"}
    content = message.get("content")
    if isinstance(content, str) and THOUGHT_END in content:
        without["content"] = content.rpartition(THOUGHT_END)[2]
    if without == message:
        return False
    changed = _replace_message(conversation, index, without)
    return template.render(changed, changed.messages[: index + 1]) == finished


def _replace_message(conversation: Conversation, index: int, message: dict[str, Any]) -> Conversation:
    messages: list[Message] = list(conversation.messages)
    messages[index] = message
    return replace(conversation, messages=tuple(messages))
