"""Fields with choices or bounds, and the check that every setting keeps to them."""

import difflib
import operator
from dataclasses import field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from lightning_dataflow.contracts import UnknownNameError, UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}
"""What a number must be; NaN is none of these."""


def one_of(*choices: str, default: str = MISSING) -> Any:
    """A field that takes one of these names. OmegaConf knows no Literal."""
    return field(default=default, metadata={"choices": choices})


def number(default: float | None, **bounds: float) -> Any:
    """A field for a number within `bounds`, named as in BOUNDS; or for null, where that is the default."""
    return field(default=default, metadata={"bounds": bounds})


def check_fields(node: Any, prefix: str = "") -> None:
    """Raise UserError for a value that its field does not take, or a key that no field reads.

    Hydra refuses unknown keys itself, but not those added by `+key=…`.
    """
    known = [item.name for item in fields(node)]
    for name in vars(node):
        if name not in known:
            near = difflib.get_close_matches(name, known)
            names = ", ".join(prefix + each for each in near or known)
            raise UserError(f"there is no setting {prefix}{name}: {'did you mean' if near else 'available are'} {names}")
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            check_fields(value, f"{prefix}{item.name}.")
            continue
        if value not in item.metadata.get("choices", (value,)):
            choices = ", ".join(item.metadata["choices"])
            raise UnknownNameError(f"{prefix}{item.name}={value} is unknown: available are {choices}")
        for rule, bound in item.metadata.get("bounds", {}).items():
            if value is not None and not BOUNDS[rule](value, bound):
                rule = rule.replace("_", " ")
                raise UserError(f"{prefix}{item.name}={value} is out of bounds: it must be {rule} {bound}")
