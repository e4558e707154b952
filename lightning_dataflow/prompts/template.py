"""Renders conversations with a chat template, as inference engines do."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.messages import Message
from lightning_dataflow.prompts.records import Conversation
from lightning_dataflow.prompts.template_source import check_variables, template_sources
from lightning_dataflow.prompts.time_limit import TimeLimitError, time_limit
from lightning_dataflow.prompts.unread import REASONING_KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_TIMEOUT_S = 5.0
USER = {"role": "user", "content": "a"}
PROBE_ARGUMENTS = ({"a": 1}, '{"a": 1}')


class Unusable(Exception):
    """A record, or a turn of it, that cannot be trained on. It is counted under the message."""


class ChatTemplate:
    """A tokenizer's chat template, or one that replaces it.

    Args:
        chat_template: Jinja text that replaces the tokenizer's own template.
        template_args: for every rendering, for example `{"enable_thinking": False}`. A record's own come first.
        today: the date that `strftime_now` writes; by default the current one.
        end_ids: token ids that end a turn, besides those that the template and the tokenizer show.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str | None = None,
        *,
        template_args: Mapping[str, Any] | None = None,
        today: date | None = None,
        end_ids: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.source = chat_template
        if not isinstance(template_args, Mapping | None):
            raise UserError(
                f"data.template_args={template_args}: give variables of the template, such as {{enable_thinking: false}}"
            )
        self.arguments = dict(template_args or {})
        if self.arguments:
            check_variables(self.arguments, self.sources)
        self.today = today or date.today()
        self.end_ids = tuple(end_ids)

    @property
    def sources(self) -> tuple[str, ...]:
        """The texts that may render a conversation; empty if there is no template."""
        return template_sources(self.tokenizer, self.source)

    @property
    def exists(self) -> bool:
        return bool(self.sources)

    @cached_property
    def text(self) -> str:
        """Raises UserError if there is no template, or several without a default."""
        try:
            return self.tokenizer.get_chat_template(self.source)
        except ValueError as error:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path} has no chat template: set data.chat_template to a Jinja "
                "file, or give records with text or input_ids"
            ) from error

    @property
    def writes_date(self) -> bool:
        """Whether the rendering depends on the day."""
        return "strftime_now" in self.text

    def render(self, conversation: Conversation, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of `messages` with the tools, documents and arguments of `conversation`.

        Args:
            prompt: with the generation prompt at the end, which asks for an assistant's turn.

        Raises:
            Unusable: the template refuses the messages, or takes longer than RENDER_TIMEOUT_S.
            UserError: the template is not valid Jinja.
        """
        return self._render(conversation, [self._with_calls(self._with_reasoning(message)) for message in messages], prompt)

    def _render(self, conversation: Conversation, messages: Sequence[Message], prompt: bool = False) -> str:
        arguments: dict[str, Any] = {"strftime_now": self._strftime_now, **self.arguments, **conversation.arguments}
        text = self._text_with_tools if conversation.tools else self.text
        try:
            with time_limit(RENDER_TIMEOUT_S):
                rendered = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(conversation.tools) or None,
                    documents=list(conversation.documents) or None,
                    chat_template=text,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **arguments,
                )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja ({error.message}, line {error.lineno}): correct it"
            ) from error
        except TimeLimitError as error:
            raise Unusable(f"rendering takes longer than {RENDER_TIMEOUT_S:g} s") from error
        except (
            jinja2.TemplateError,
            TypeError,
            LookupError,
            ValueError,
            ArithmeticError,
            RuntimeError,
            AttributeError,
        ) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise Unusable(f"refused by the chat template ({reason})") from error
        return str(rendered)

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """The texts of the tokens at which engines stop: the end-of-sequence tokens."""
        ids = {*self.end_ids, self.tokenizer.eos_token_id}
        return tuple(token.content for index, token in self.tokenizer.added_tokens_decoder.items() if index in ids)

    @cached_property
    def turn_ends(self) -> tuple[str, ...]:
        """The texts of the tokens that end an assistant's turn.

        They are the end-of-sequence tokens, and the special token that follows the content in a conversation rendered to
        find it. If the template refuses that conversation, all special tokens are taken.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        try:
            ends = {*self.stops, *self._ends_in_probe([token.content for token in added])}
        except Unusable:
            ends = {*self.stops, *(token.content for token in added if token.special)}
        return tuple(sorted(ends, key=len, reverse=True))

    def _ends_in_probe(self, special: Sequence[str]) -> Iterator[str]:
        """Where several special tokens follow each other, an end-of-sequence token among them ends the turn."""
        for later in ([], [USER]):
            rest = self._after_content(later)
            found = [(rest.index(token), -len(token), token) for token in special if token in rest]
            if found:
                token = min(found)[2]
                if not any(stop in self._leading(rest, special) for stop in self.stops):
                    yield token

    def _leading(self, text: str, special: Sequence[str]) -> list[str]:
        """The special tokens at the start of `text`, with nothing but white space between them."""
        tokens: list[str] = []
        while token := next((token for token in special if text.lstrip().startswith(token)), None):
            tokens.append(token)
            text = text.lstrip()[len(token) :]
        return tokens

    def _after_content(self, later: Sequence[Message] = ()) -> str:
        """What the template writes after the content of an assistant's turn."""
        first, second = (
            self.render(Conversation(messages=()), [USER, {"role": "assistant", "content": content}, *later])
            for content in ("bc", "de")
        )
        return first[len(first) - common_length(first[::-1], second[::-1]) :]

    @cached_property
    def dropped_role(self) -> str | None:
        """`user` or `assistant` if the content of such messages has no effect, as with keys of other names."""
        turns = [USER, {"role": "assistant", "content": "a"}]
        for index, turn in enumerate(turns):
            other = [*turns[:index], {**turn, "content": "b"}, *turns[index + 1 :]]
            try:
                if self.render(Conversation(messages=()), turns) == self.render(Conversation(messages=()), other):
                    return turn["role"]
            except Unusable:
                return None
        return None

    @cached_property
    def generation_prompt(self) -> str | None:
        """What the template adds to ask for a turn after a user's message; None where it refuses a user's message alone."""
        nothing = Conversation(messages=())
        try:
            before, prompt = self.render(nothing, [USER]), self.render(nothing, [USER], prompt=True)
        except Unusable:
            return None
        return prompt[common_length(before, prompt) :] or self.constant_prompt

    @cached_property
    def constant_prompt(self) -> str:
        """The generation prompt of a template that writes it at the end of every rendering; empty for all others."""
        nothing = Conversation(messages=())
        try:
            before, prompt = self.render(nothing, [USER]), self.render(nothing, [USER], prompt=True)
            rest = self._after_content()
        except Unusable:
            return ""
        if before != prompt:
            return ""
        shared = rest[len(rest) - common_length(before[::-1], rest[::-1]) :]
        ends = [shared.rfind(end) + len(end) for end in self.turn_ends if end in shared]
        after_end = shared[max(ends) :] if ends else ""
        return after_end if after_end.strip() else ""

    @cached_property
    def _text_with_tools(self) -> str:
        """Tokenizers may have a template of their own for tools, named `tool_use`."""
        if isinstance(self.tokenizer.chat_template, dict) and "tool_use" in self.tokenizer.chat_template:
            return self.text if self.source is not None else str(self.tokenizer.chat_template["tool_use"])
        return self.text

    @cached_property
    def _reasoning_keys(self) -> tuple[str, ...]:
        return tuple(key for key in REASONING_KEYS if key in self.text)

    @cached_property
    def _reads_null(self) -> bool:
        """Whether null content of a message with tool calls has a meaning of its own.

        Engines give empty text instead, because published templates refuse null or write None. Others ask for null.
        """
        renderings = [
            (self._render_call(None, arguments), self._render_call("None", arguments)) for arguments in PROBE_ARGUMENTS
        ]
        return any(null not in (None, written) for null, written in renderings)

    @cached_property
    def _reads_arguments_as_text(self) -> bool:
        """Some published templates add the arguments of a tool call to text, which refuses an object."""
        as_object, as_text = (
            self._render_call(None if self._reads_null else "", arguments) for arguments in PROBE_ARGUMENTS
        )
        return as_object is None and as_text is not None

    def _render_call(self, content: str | None, arguments: Any) -> str | None:
        """A message with a tool call; None if the template refuses it."""
        call = {"id": "call00000", "type": "function", "function": {"name": "a", "arguments": arguments}}
        turn = {"role": "assistant", "content": content, "tool_calls": [call]}
        try:
            return self._render(Conversation(messages=()), [USER, turn])
        except Unusable:
            return None

    def _with_calls(self, message: Message) -> Message:
        """The message with null content and arguments as the template reads them."""
        calls, content = message.get("tool_calls"), message.get("content")
        if content is None and not self._reads_null:
            message = {**message, "content": ""}
        if calls and self._reads_arguments_as_text:
            message = {**message, "tool_calls": [_with_arguments_as_text(call) for call in calls]}
        return message

    def _with_reasoning(self, message: Message) -> Message:
        """The message with its reasoning under the names that the template reads."""
        reasoning = message.get("reasoning_content")
        if not reasoning:
            return message
        others = {key: value for key, value in message.items() if key != "reasoning_content"}
        return others | dict.fromkeys(self._reasoning_keys, reasoning)

    def _strftime_now(self, format: str) -> str:
        return datetime.combine(self.today, datetime.min.time()).strftime(format)


def _with_arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def common_length(first: str, second: str) -> int:
    """The number of characters at the start that both texts share."""
    if second.startswith(first):
        return len(first)
    low, high = 0, min(len(first), len(second))
    while low < high:  # slices compare far faster than characters one by one
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
