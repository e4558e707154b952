import importlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest

from lightning_dataflow.contracts import assert_no_tensors


@dataclass(frozen=True)
class Record:
    payload: Any


@pytest.mark.parametrize(("library", "shape"), [("torch", 2), ("numpy", 2), ("torch", ())])
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda t: t, "record"),
        (lambda t: Record(payload={"a": [1, t]}), r"record\.payload\['a'\]\[1\]"),
        (lambda t: MappingProxyType({"deep": ({"er": t},)}), r"record\['deep'\]\[0\]\['er'\]"),
    ],
)
def test_names_the_path_of_a_tensor(library, shape, wrap, path):
    tensor = importlib.import_module(library).zeros(shape)
    with pytest.raises(TypeError, match=f"^{path} is a "):
        assert_no_tensors(wrap(tensor))


def test_plain_data_passes():
    assert_no_tensors(Record(payload={"ids": [1, 2], "name": "x", "shape": (2, 3), "none": None, "type": Record}))
