"""JSON without NaN."""

import json
import math

import pytest

from lightning_dataflow.contracts import strict_json


def test_numbers_that_json_does_not_have_become_null():
    value = {"losses": (1.5, math.nan), "nested": [{"rate": math.inf, "name": "NaN"}, -math.inf], "count": 3, "none": None}
    text = strict_json(value, indent=1)
    expected = {"losses": [1.5, None], "nested": [{"rate": None, "name": "NaN"}, None], "count": 3, "none": None}
    assert json.loads(text, parse_constant=pytest.fail) == expected
