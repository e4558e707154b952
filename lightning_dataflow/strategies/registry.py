"""Strategies by name. A new algorithm registers its StrategySpec; no topology, store or launcher knows it."""

import importlib
from typing import TYPE_CHECKING

from lightning_dataflow.contracts import UnknownNameError

if TYPE_CHECKING:  # it needs torch, and names alone do not
    from lightning_dataflow.strategies.spec import StrategySpec

_BUILT_IN = {
    "dflash": "lightning_dataflow.strategies.dflash.module:SPEC",
    "domino": "lightning_dataflow.strategies.domino.module:SPEC",
    "eagle3": "lightning_dataflow.strategies.eagle3.module:SPEC",
}
"""Where the strategies of this package are, loaded when they are used."""

_REGISTERED: dict[str, "StrategySpec"] = {}


def register_strategy(spec: "StrategySpec") -> "StrategySpec":
    """Make `spec` available under its name. Raises ValueError when another one has the name."""
    if spec.name in available_strategies() and (known := resolve_strategy(spec.name)) != spec:
        raise ValueError(f"strategy {spec.name} is registered already, by {known.module.__name__}")
    _REGISTERED[spec.name] = spec
    return spec


def resolve_strategy(name: str) -> "StrategySpec":
    """The spec of `name`. Raises KeyError listing the available names."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _BUILT_IN:
        raise UnknownNameError(f"unknown strategy {name!r}: available are {', '.join(available_strategies())}")
    module, attribute = _BUILT_IN[name].split(":")
    spec: StrategySpec = getattr(importlib.import_module(module), attribute)
    return spec


def available_strategies() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(_REGISTERED.keys() | _BUILT_IN.keys()))
