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

_MODULES = {
    "callbacks": ["AcceptanceEvaluation"],
    "checkpoints.markers": ["latest_checkpoint"],
    "checkpoints.trainer": ["DataFlowTrainer"],
    "control": ["SqliteMetadataStore", "Watermarks", "resolve_control_plane"],
    "control.local.log": ["FileChannel"],
    "data": ["DataFlowDataModule", "ManifestSource", "OfflineSource", "StreamingSource"],
    "export.export": ["export_draft"],
    "producers": ["ColocatedSource", "OnlineSource", "PromptFeed", "RolloutWorker", "capture_to_folder"],
    "prompts": ["load_prompts"],
    "services.mooncake": ["LocalMooncake"],
    "stores": ["MemoryFeatureStore", "MooncakeFeatureStore", "SharedDirFeatureStore"],
    "strategies.dflash.module": ["DFlashModule"],
    "strategies.domino.module": ["DominoModule"],
    "strategies.eagle3.module": ["Eagle3Module"],
    "strategies.module": ["DraftModule"],
    "strategies.registry": ["available_strategies", "register_strategy", "resolve_strategy"],
    "strategies.spec": ["StrategySpec"],
    "targets": ["HFTargetEngine", "load_tokenizer"],
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_NAMES)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
