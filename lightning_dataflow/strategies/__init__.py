"""Draft-training strategies: one LightningModule each, found by name."""

from lightning_dataflow.strategies.base import DraftModule
from lightning_dataflow.strategies.dflash import DFlashModule
from lightning_dataflow.strategies.domino import DominoModule
from lightning_dataflow.strategies.eagle3 import Eagle3Module
from lightning_dataflow.strategies.registry import (
    StrategySpec,
    available_strategies,
    register_strategy,
    resolve_strategy,
)

__all__ = [
    "DFlashModule",
    "DominoModule",
    "DraftModule",
    "Eagle3Module",
    "StrategySpec",
    "available_strategies",
    "register_strategy",
    "resolve_strategy",
]
