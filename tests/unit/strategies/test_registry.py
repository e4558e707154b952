from dataclasses import replace

import pytest

from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from lightning_dataflow.strategies.registry import available_strategies, register_strategy, resolve_strategy


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
