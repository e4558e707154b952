"""NaN and infinity are found in every dtype, and nothing else is taken for them."""

import math

import pytest
import torch

from lightning_dataflow.data.finite import broken_features, first_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_found(dtype, value):
    tensors = {"fine": torch.ones(4, dtype=dtype), "bad": torch.zeros(300, 70, dtype=dtype)}
    tensors["bad"][177, 33] = value
    assert first_not_finite(tensors) == "bad"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_numbers_are_finite(dtype):
    extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min] * 1000, dtype=dtype)
    others = {"ids": torch.tensor([1 << 62]), "mask": torch.tensor([True]), "none": torch.zeros(0)}
    assert first_not_finite({"extremes": extremes, **others}) is None


def test_the_line_names_sample_and_feature():
    features = {"aux_hidden_states": torch.zeros(2), "last_hidden_state": torch.tensor([0.0, math.nan])}
    line = broken_features(features, "tiny-3", "run:tiny-3-p0")
    assert line is not None
    assert line.startswith("last_hidden_state of sample tiny-3 (run:tiny-3-p0) holds NaN or infinity: check the target's")
