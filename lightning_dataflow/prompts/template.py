"""Renders conversations with a chat template, as inference engines do."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.messages import REASONING_KEYS, Message
from lightning_dataflow.prompts.records import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_TIMEOUT_S = 5.0


class Unusable(Exception):
    """A record, or a turn of it, that cannot be trained on. It is counted under the message."""


class ChatTemplate:
    """A tokenizer's chat template, or one that replaces it.

    Args:
        source: Jinja text that replaces the tokenizer's own template.
        arguments: for every rendering, for example `enable_thinking`. A record's own arguments come first.
        today: the date that `strftime_now` writes; by default the current one.
        end_ids: token ids that end a turn, besides those that the template and the tokenizer show.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        source: str | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        today: date | None = None,
        end_ids: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.source = source
        self.arguments = dict(arguments or {})
        self.today = today or date.today()
        self.end_ids = tuple(end_ids)

    @property
    def exists(self) -> bool:
        return self.source is not None or self.tokenizer.chat_template is not None

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
        arguments: dict[str, Any] = {"strftime_now": self._strftime_now, **self.arguments, **conversation.arguments}
        try:
            with _time_limit(RENDER_TIMEOUT_S):
                rendered = self.tokenizer.apply_chat_template(
                    [self._with_reasoning(message) for message in messages],
                    tools=list(conversation.tools) or None,
                    documents=list(conversation.documents) or None,
                    chat_template=self.text if not conversation.tools else self._text_with_tools,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **arguments,
                )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja ({error.message}, line {error.lineno}): correct it"
            ) from error
        except RenderTimeout as error:
            raise Unusable(f"rendering takes longer than {RENDER_TIMEOUT_S:g} s") from error
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, RecursionError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise Unusable(f"refused by the chat template ({reason})") from error
        return str(rendered)

    @cached_property
    def turn_ends(self) -> tuple[str, ...]:
        """The texts of the tokens that end an assistant's turn.

        They are the end-of-sequence tokens, and the special token that follows the content in a conversation rendered to
        find it. If the template refuses that conversation, all special tokens are taken.
        """
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        ids = {*self.end_ids, self.tokenizer.eos_token_id}
        ends = {token.content for index, token in self.tokenizer.added_tokens_decoder.items() if index in ids}
        try:
            ends |= set(self._ends_in_probe(special))
        except Unusable:
            ends |= set(special)
        return tuple(sorted(ends, key=len, reverse=True))

    def _ends_in_probe(self, special: Sequence[str]) -> Iterator[str]:
        user = {"role": "user", "content": "a"}
        for later in ([], [user]):
            first, second = (
                self.render(Conversation(messages=()), [user, {"role": "assistant", "content": content}, *later])
                for content in ("bc", "de")
            )
            rest = first[len(first) - common_length(first[::-1], second[::-1]) :]
            found = [(rest.index(token), -len(token), token) for token in special if token in rest]
            if found:
                yield min(found)[2]

    @cached_property
    def generation_prompt(self) -> str | None:
        """What the template adds to ask for a turn after a user's message; None where it refuses a user's message alone."""
        user, nothing = [{"role": "user", "content": "a"}], Conversation(messages=())
        try:
            before, prompt = self.render(nothing, user), self.render(nothing, user, prompt=True)
        except Unusable:
            return None
        return prompt[common_length(before, prompt) :]

    @cached_property
    def _text_with_tools(self) -> str:
        """Tokenizers may have a template of their own for tools, named `tool_use`."""
        return self.text if self.source is not None else str(self.tokenizer.get_chat_template(None, tools=[{}]))

    @cached_property
    def _reasoning_keys(self) -> tuple[str, ...]:
        return tuple(key for key in REASONING_KEYS if key in self.text)

    def _with_reasoning(self, message: Message) -> Message:
        """The message with its reasoning under the names that the template reads."""
        reasoning = message.get("reasoning_content")
        if not reasoning:
            return message
        others = {key: value for key, value in message.items() if key != "reasoning_content"}
        return others | dict.fromkeys(self._reasoning_keys, reasoning)

    def _strftime_now(self, format: str) -> str:
        return datetime.combine(self.today, datetime.min.time()).strftime(format)


class RenderTimeout(Exception):
    """Rendering a conversation took too long."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises RenderTimeout in the block. Signals reach the main thread only, so other threads have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise RenderTimeout

    previous, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if remaining:  # somebody else's timer goes on
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - began), 1e-3))


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
