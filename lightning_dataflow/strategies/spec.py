"""What the rest of the system must know about an algorithm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dataflow.strategies.published.contract import DraftExport


@dataclass(frozen=True, kw_only=True)
class StrategySpec:
    """An algorithm. Nothing outside its folder knows more about it.

    Attributes:
        name: in settings, checkpoints and results.
        title: for people.
        paper: its number on arXiv, if there is one.
        module: the DraftModule that trains it.
        default_layer_ids: number of target layers → the layers to capture.
        features: settings of the module → names of the features that its `collate` reads. Only those are captured.
        export: folders for serving engines; None if there is no engine for such drafts.
    """

    name: str
    title: str
    paper: str | None = None
    module: type[Any]
    default_layer_ids: Callable[[int], tuple[int, ...]]
    features: Callable[[Mapping[str, Any]], tuple[str, ...]]
    export: DraftExport | None = None
