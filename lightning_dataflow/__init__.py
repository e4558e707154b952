"""Train draft models for speculative decoding as a PyTorch Lightning plugin.

Importing this package is cheap: names are loaded when they are first used.
"""

import importlib
from typing import Any

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


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
