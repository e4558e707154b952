"""Train draft models for speculative decoding as a PyTorch Lightning plugin.

Importing this package is cheap: names are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers, which do not see __getattr__
    from lightning_dataflow.callbacks import AcceptanceEvaluation as AcceptanceEvaluation
    from lightning_dataflow.checkpoints.markers import latest_checkpoint as latest_checkpoint
    from lightning_dataflow.checkpoints.trainer import DataFlowTrainer as DataFlowTrainer
    from lightning_dataflow.control import (
        SqliteMetadataStore as SqliteMetadataStore,
        Watermarks as Watermarks,
        resolve_control_plane as resolve_control_plane,
    )
    from lightning_dataflow.control.local.log import FileChannel as FileChannel
    from lightning_dataflow.data import (
        DataFlowDataModule as DataFlowDataModule,
        ManifestSource as ManifestSource,
        OfflineSource as OfflineSource,
        StreamingSource as StreamingSource,
    )
    from lightning_dataflow.export.export import export_draft as export_draft
    from lightning_dataflow.producers import (
        ColocatedSource as ColocatedSource,
        OnlineSource as OnlineSource,
        PromptFeed as PromptFeed,
        RolloutWorker as RolloutWorker,
        capture_to_folder as capture_to_folder,
    )
    from lightning_dataflow.prompts import load_prompts as load_prompts
    from lightning_dataflow.services.mooncake import LocalMooncake as LocalMooncake
    from lightning_dataflow.stores import (
        MemoryFeatureStore as MemoryFeatureStore,
        MooncakeFeatureStore as MooncakeFeatureStore,
        SharedDirFeatureStore as SharedDirFeatureStore,
    )
    from lightning_dataflow.strategies.dflash.module import DFlashModule as DFlashModule
    from lightning_dataflow.strategies.domino.module import DominoModule as DominoModule
    from lightning_dataflow.strategies.eagle3.module import Eagle3Module as Eagle3Module
    from lightning_dataflow.strategies.module import DraftModule as DraftModule
    from lightning_dataflow.strategies.registry import (
        available_strategies as available_strategies,
        register_strategy as register_strategy,
        resolve_strategy as resolve_strategy,
    )
    from lightning_dataflow.strategies.spec import StrategySpec as StrategySpec
    from lightning_dataflow.targets import HFTargetEngine as HFTargetEngine, load_tokenizer as load_tokenizer

_NAMES = {
    "AcceptanceEvaluation": "callbacks",
    "ColocatedSource": "producers",
    "DFlashModule": "strategies.dflash.module",
    "DataFlowDataModule": "data",
    "DataFlowTrainer": "checkpoints.trainer",
    "DominoModule": "strategies.domino.module",
    "DraftModule": "strategies.module",
    "Eagle3Module": "strategies.eagle3.module",
    "FileChannel": "control.local.log",
    "HFTargetEngine": "targets",
    "LocalMooncake": "services.mooncake",
    "ManifestSource": "data",
    "MemoryFeatureStore": "stores",
    "MooncakeFeatureStore": "stores",
    "OfflineSource": "data",
    "OnlineSource": "producers",
    "PromptFeed": "producers",
    "RolloutWorker": "producers",
    "SharedDirFeatureStore": "stores",
    "SqliteMetadataStore": "control",
    "StrategySpec": "strategies.spec",
    "StreamingSource": "data",
    "Watermarks": "control",
    "available_strategies": "strategies.registry",
    "capture_to_folder": "producers",
    "export_draft": "export.export",
    "latest_checkpoint": "checkpoints.markers",
    "load_prompts": "prompts",
    "load_tokenizer": "targets",
    "register_strategy": "strategies.registry",
    "resolve_control_plane": "control",
    "resolve_strategy": "strategies.registry",
}

__all__ = sorted(_NAMES)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
