"""Strategies by name. A new algorithm registers its StrategySpec; no topology, store or launcher knows it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_dataflow.contracts import UnknownNameError

if TYPE_CHECKING:
    from lightning_dataflow.strategies.module import DraftModule


@dataclass(frozen=True, kw_only=True)
class StrategySpec:
    """What the rest of the system must know of an algorithm.

    Attributes:
        default_layer_ids: number of target layers → the layers to capture.
        features: names of the features that the module's `collate` reads.
    """

    name: str
    module: "type[DraftModule]"
    default_layer_ids: Callable[[int], tuple[int, ...]]
    features: tuple[str, ...]


_BUILT_IN = {
    "dflash": "lightning_dataflow.strategies.dflash.module",
    "domino": "lightning_dataflow.strategies.domino.module",
    "eagle3": "lightning_dataflow.strategies.eagle3.module",
}
"""Modules that register the strategies of this package, imported when one is asked for."""

_SPECS: dict[str, StrategySpec] = {}


def register_strategy(spec: StrategySpec) -> StrategySpec:
    """Make `spec` available under its name. Raises ValueError when the name is taken by another."""
    if _SPECS.get(spec.name, spec) != spec:
        raise ValueError(f"strategy {spec.name} is registered already, by {_SPECS[spec.name].module.__name__}")
    _SPECS[spec.name] = spec
    return spec


def resolve_strategy(name: str) -> StrategySpec:
    """The spec of `name`. Raises KeyError listing the names that there are."""
    if name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    try:
        return _SPECS[name]
    except KeyError:
        raise UnknownNameError(f"unknown strategy {name!r}: available are {', '.join(available_strategies())}") from None


def available_strategies() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(_SPECS.keys() | _BUILT_IN.keys()))
