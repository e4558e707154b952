"""The comparison of engines sees what an engine can get wrong."""

from collections.abc import Callable, Sequence

import pytest
import torch

from lightning_dataflow.targets import HFTargetEngine, TargetEngine
from lightning_dataflow.targets.conformance import compare_engines, make_prompts, table
from tests.conftest import LAYER_IDS

Features = dict[str, torch.Tensor]


class Altered(TargetEngine):
    """hf with a fault."""

    backend = "altered"

    def __init__(self, target: HFTargetEngine, alter: Callable[[Features], Features]):
        self.info, self.dtype, self.layer_ids = target.info, target.dtype, LAYER_IDS
        self._target, self._alter = target, alter

    def capture(self, batch: Sequence[Sequence[int]]) -> list[Features]:
        return [self._alter(features) for features in self._target.capture(batch)]


@pytest.fixture(scope="module")
def every_layer(target_path) -> HFTargetEngine:
    return HFTargetEngine(target_path, layer_ids=range(8), dtype="float32", device="cpu")


def layers(features: Features, *ids: int) -> Features:
    states = features["aux_hidden_states"].split(64, dim=-1)
    return {**features, "aux_hidden_states": torch.cat([states[layer] for layer in ids], dim=-1)}


def rows(features: Features, part: slice) -> Features:
    return {name: tensor[part] for name, tensor in features.items()}


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (lambda found: layers(found, *LAYER_IDS), None),
        (lambda found: layers(found, 1, 3, 5), "layer 4 is layer 5"),
        (lambda found: layers(found, 0, 3, 4), "layer 1 is layer 0"),
        (lambda found: layers(found, 1, 3), "2 layers instead of 3"),
        (
            lambda found: layers({**found, "last_hidden_state": found["aux_hidden_states"][:, -64:]}, *LAYER_IDS),
            "last is layer 7, before the final norm",
        ),
        (lambda found: rows(layers(found, *LAYER_IDS), slice(10, None)), "last lacks the first 10 of 33 tokens"),
        (lambda found: rows(layers(found, *LAYER_IDS), slice(0, 32)), "layer 1 lacks the last 1 of 33 tokens"),
        (
            lambda found: {**layers(found, *LAYER_IDS), "last_hidden_state": 1.01 * found["last_hidden_state"]},
            "last differs",
        ),
    ],
)
def test_faults_are_named(every_layer, alter, problem):
    prompts = make_prompts(every_layer.info.vocab_size, 33, lengths=(33,))
    found = compare_engines(every_layer, Altered(every_layer, alter), prompts)
    assert len(found) == 2
    for one in found:
        assert (problem in one.problems) if problem else not one.problems
    assert (problem or "the same") in table(found)


def test_lengths_are_cut_to_what_the_engine_reads():
    assert [len(prompt) for prompt in make_prompts(320, 40)] == [1, 2, 7, 33]
