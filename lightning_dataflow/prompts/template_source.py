"""Checks names against the text of a chat template, which renders a misspelt one without a word."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.messages import SHAREGPT_ROLES, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"system", "developer", "user", "assistant", "tool", *SHAREGPT_ROLES}


def template_sources(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> tuple[str, ...]:
    """The text that replaces the tokenizer's template, or all templates of the tokenizer; empty if it has none."""
    own = tokenizer.chat_template if chat_template is None else chat_template
    if own is None:
        return ()
    return tuple(own.values()) if isinstance(own, dict) else (own,)


def check_variables(arguments: Mapping[str, Any], sources: Sequence[str]) -> None:
    """Raise UserError for a variable of `data.template_args` that no template reads."""
    for name in map(str, arguments):
        if sources and not any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources):
            raise UserError(f"data.template_args: the chat template has no variable {name}: correct the name or remove it")


def check_roles(messages: Iterable[Message], sources: Sequence[str]) -> None:
    """Raise UserError for a role that is not a usual one, and that no template names in quotes."""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        is_named = any(quote + role + quote in source for source in sources for quote in "'\"")
        if sources and role not in ROLES and not is_named:
            raise UserError(
                f"message {number}: the role {role!r} is unknown and the chat template does not name it: "
                "use system, user, assistant or tool"
            )
