"""Reads records that are token ids already."""

import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.unread import MASKS, as_list, is_empty, snake_case, value_of

LARGEST_ID = 2**31 - 1
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids with their own mask; every token is supervised when the record has none."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


def read_tokens(record: Mapping[str, Any]) -> Tokens:
    """The tokens of a record that have an `attention_mask` of 1. Raises UserError for masks or labels of another shape."""
    ids = token_ids(record["input_ids"])
    mask = [1] * len(ids)
    for key, value in record.items():
        name = snake_case(key)
        if name in MASKS and value is not None:
            mask = [old and new for old, new in zip(mask, _flags(key, value, len(ids)), strict=True)]
        elif name == "labels" and not is_empty(value):
            mask = [old and new for old, new in zip(mask, _labelled(value, ids), strict=True)]
    kept = _kept_positions(record, len(ids))
    return Tokens(input_ids=tuple(ids[index] for index in kept), loss_mask=tuple(mask[index] for index in kept))


def _flags(key: str, value: Any, length: int) -> list[int]:
    value = as_list(value)
    if not isinstance(value, list | tuple):
        raise UserError(f"{key} is {show(value)}: give a list with 0 or 1 for each of the input_ids")
    if len(value) != length:
        raise UserError(f"{length} input_ids, {len(value)} {key} entries: give 0 or 1 for each of the input_ids")
    for index, flag in enumerate(value):
        if flag not in (0, 1):
            raise UserError(f"{key}[{index}] is {show(flag)}: give 1 where a token is supervised, else 0")
    return [int(flag) for flag in value]


def _labelled(value: Any, ids: Sequence[int]) -> list[int]:
    labels = as_list(value)
    if not isinstance(labels, list | tuple) or len(labels) != len(ids):
        raise UserError(f"{len(ids)} input_ids, labels {show(labels)}: give one for each of the input_ids")
    for index, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORED_LABEL, token):
            raise UserError(
                f"labels[{index}] is {show(label)} and input_ids[{index}] is {token}: give the token itself where it is "
                f"supervised, not the next one, and {IGNORED_LABEL} elsewhere"
            )
    return [int(label != IGNORED_LABEL) for label in labels]


def _kept_positions(record: Mapping[str, Any], length: int) -> range:
    """The positions that `attention_mask` does not call padding; they are in one stretch."""
    value = value_of(record, ("attention_mask",))
    flags = [1] * length if value is None else _flags("attention_mask", value, length)
    kept = [index for index, flag in enumerate(flags) if flag]
    if not kept or kept[-1] - kept[0] + 1 != len(kept):
        raise UserError("attention_mask hides tokens between others, or all: give one sample a record")
    positions = value_of(record, ("position_ids",))
    if positions is not None and list(positions)[kept[0] : kept[-1] + 1] != list(range(len(kept))):
        raise UserError("position_ids do not count from 0: give one sample a record, without packing")
    return range(kept[0], kept[-1] + 1)


def token_ids(value: Any) -> tuple[int, ...]:
    """`input_ids` of a record. Raises UserError unless they are a list of token ids."""
    if not isinstance(value, list | tuple):
        raise UserError(f"input_ids is {show(value)}: give a list of token ids")
    for index, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= LARGEST_ID:
            raise UserError(f"input_ids[{index}] is {show(token)}: token ids are integers from 0 to {LARGEST_ID}")
    return tuple(value)


def show(value: Any, shorten: Callable[[Any], str] = reprlib.repr) -> str:
    """`value` on one short line. Python refuses to print integers of thousands of digits."""
    try:
        return " ".join(shorten(value).split())
    except ValueError:
        return f"a number of more than {sys.get_int_max_str_digits()} digits"
