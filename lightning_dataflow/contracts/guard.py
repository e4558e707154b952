"""The guard at every door of the control plane: references travel there, tensors never do."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def assert_no_tensors(record: Any, path: str = "record") -> None:
    """Raise TypeError naming the path of the first tensor or array inside `record`.

    Duck-typed on (shape, dtype, device or strides), so that neither torch nor numpy is imported.
    """
    if _is_tensor(record):
        raise TypeError(f"{path} is a {type(record).__name__}: tensors travel through the feature store, put it there")
    if is_dataclass(record) and not isinstance(record, type):
        for field in fields(record):
            assert_no_tensors(getattr(record, field.name), f"{path}.{field.name}")
    elif isinstance(record, Mapping):
        for key, value in record.items():
            assert_no_tensors(value, f"{path}[{key!r}]")
    elif isinstance(record, list | tuple | set | frozenset):
        for index, value in enumerate(record):
            assert_no_tensors(value, f"{path}[{index}]")


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape") and (hasattr(value, "device") or hasattr(value, "strides"))
