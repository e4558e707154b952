from dataclasses import replace

import pytest

from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from lightning_dataflow.strategies.registry import available_strategies, register_strategy, resolve_strategy
from lightning_dataflow.targets.base import check_layer_ids


def test_eagle3_is_there():
    assert "eagle3" in available_strategies()
    assert resolve_strategy("eagle3").module is Eagle3Module


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(KeyError, match=r"unknown strategy 'eagle9': available are .*eagle3"):
        resolve_strategy("eagle9")


def test_a_name_is_registered_once():
    spec = resolve_strategy("eagle3")
    assert register_strategy(spec) is spec
    with pytest.raises(ValueError, match="eagle3 is registered already, by Eagle3Module"):
        register_strategy(replace(spec, features=()))


def test_default_layers():
    assert resolve_strategy("eagle3").default_layer_ids(32) == (1, 15, 28)
    assert resolve_strategy("eagle3").default_layer_ids(30) == (1, 14, 26)


@pytest.mark.parametrize("strategy", ["eagle3", "dflash", "domino"])
@pytest.mark.parametrize("num_layers", range(1, 12))
def test_default_layers_fit_shallow_targets(strategy, num_layers):
    ids = resolve_strategy(strategy).default_layer_ids(num_layers)
    assert check_layer_ids(ids, num_layers) == ids
    assert num_layers < 3 or (ids[-1] < num_layers - 1 and len(ids) >= min(2, num_layers - 3))
