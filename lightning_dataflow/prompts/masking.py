"""Chat templates and loss masks: which tokens are the assistant's own."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import jinja2

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.conversation import Message, Messages, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Unusable(Exception):
    """A record that cannot be trained on. It is counted under the message."""


class Encoder:
    """Turns records into (input_ids, loss_mask), both lists of S ints.

    A template with `{% generation %}` marks the assistant's tokens itself. For any other template, growing prefixes of the
    conversation are rendered: an assistant turn is the text between the conversation before it, rendered with the
    generation prompt, and the conversation that includes it. The turn ends with the end-of-turn token. White space that the
    template writes after that token is never generated, so it is not supervised. Neither is a token that crosses the border
    of a turn.

    Args:
        tokenizer: a fast tokenizer (character offsets are needed).
        chat_template: overrides the tokenizer's own.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def encode(self, record: Messages | str | Tokens) -> tuple[list[int], list[int]]:
        """Of messages, the assistant's tokens are supervised; of text, all are.

        Raises Unusable when the template refuses the conversation, UserError when there is no template.
        """
        if isinstance(record, Tokens):
            return list(record.input_ids), list(record.loss_mask)
        if isinstance(record, str):
            ids = self.tokenizer(record)["input_ids"]
            return ids, [1] * len(ids)
        if not any(message["role"] == "assistant" for message in record):
            raise Unusable("no assistant turn")
        if record[0]["role"] == "assistant":
            raise Unusable("begins with an assistant turn")
        if _GENERATION_TAG.search(self._template()):
            return self._encode_tagged(record)
        return self._encode_by_prefixes(record)

    def encode_question(self, text: str) -> list[int]:
        """Token ids of a user's message and the generation prompt; of the text alone where there is no chat template."""
        if self.chat_template is None and self.tokenizer.chat_template is None:
            return list(self.tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        rendered = self._render(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _template(self) -> str:
        try:
            return self.tokenizer.get_chat_template(self.chat_template)
        except ValueError as error:  # none, or several without a default
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path} has no chat template: set data.chat_template to a Jinja "
                "file, or give records with text or input_ids"
            ) from error

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja ({error.message}, line {error.lineno}): correct it"
            ) from error
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise Unusable(f"refused by the chat template ({str(error).splitlines()[0][:100]})") from error

    def _encode_tagged(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        encoded = self._render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], encoded["assistant_masks"]

    def _encode_by_prefixes(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        text = self._render(messages, tokenize=False)
        spans = [self._turn_span(messages, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        mask = [0] * len(ids)
        for index, (start, end) in enumerate(encoded["offset_mapping"]):
            if start < end and any(first <= start and end <= last for first, last in spans):
                mask[index] = 1
        return ids, mask

    def _turn_span(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
        """Characters [start, end) of assistant turn `index` in the rendered conversation."""
        before = self._render(messages[:index], tokenize=False)
        prefix = self._render(messages[:index], add_generation_prompt=True, tokenize=False)
        through = self._render(messages[: index + 1], tokenize=False)
        # The generation prompt may open a thought that the finished turn does not show.
        start = _common_length(prefix, text)
        if start < len(before):
            raise Unusable("the chat template rewrites earlier turns")
        if text.startswith(through) and len(through) > start:
            end = len(through)
        else:  # the template renders this turn differently when it is the last
            content = str(messages[index].get("content") or "").strip()
            end = text.find(content, start) + len(content)
            if not content or end < start + len(content):
                raise Unusable("the chat template rewrites earlier turns")
            end = self._after_end_of_turn(text, end)
        return start, start + len(self._without_trailing_space(text[start:end]))

    def _after_end_of_turn(self, text: str, end: int) -> int:
        tokens = (token for token in self.tokenizer.all_special_tokens if text.startswith(token, end))
        return end + len(next(tokens, ""))

    def _without_trailing_space(self, turn: str) -> str:
        stripped = turn.rstrip()
        return stripped if stripped.endswith(tuple(self.tokenizer.all_special_tokens)) else turn


def _common_length(first: str, second: str) -> int:
    """The number of characters at the start that both texts share."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
