"""Bounds of the sizes that models may have: a wrong number in a file must not become an allocation."""

import math
from typing import Any

from lightning_dataflow.contracts import UserError

MAX_SIZE = 1 << 20
_LIMITS = {
    "hidden_size": 1 << 17,
    "vocab_size": 1 << 23,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 13,
    "num_key_value_heads": 1 << 13,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 30,
}


def check_count(value: Any, name: str, where: object, *, least: int = 1) -> int:
    """`value` if it is a plausible size; raises UserError naming it otherwise."""
    limit = _LIMITS.get(name, MAX_SIZE)
    if type(value) is not int or not least <= value <= limit:
        raise UserError(f"{where}: {name}={value!r} is no size, expected a whole number from {least} to {limit}")
    return value


def check_real(value: Any, name: str, where: object, *, above: float, most: float) -> float:
    """`value` as a float if above < value ≤ most; raises UserError naming it otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value <= most or math.isnan(value):
        raise UserError(f"{where}: {name}={value!r} is no number above {above:g} and up to {most:g}")
    return float(value)


def check_eps(value: Any, where: object) -> float:
    """The eps of a norm."""
    return check_real(value, "rms_norm_eps", where, above=0, most=1)


def check_theta(value: Any, where: object) -> float:
    """The base of a rotary embedding."""
    return check_real(value, "rope_theta", where, above=1, most=1e15)
