"""Train draft models for speculative decoding as a PyTorch Lightning plugin.

Importing this package is cheap: names are loaded when they are first used.
"""

import importlib
from typing import Any

_NAMES = {
    "AcceptanceEvaluation": "callbacks",
    "ColocatedSource": "producers",
    "DFlashModule": "strategies",
    "DataFlowDataModule": "data",
    "DataFlowTrainer": "checkpoints.trainer",
    "DominoModule": "strategies",
    "DraftModule": "strategies",
    "Eagle3Module": "strategies",
    "FileChannel": "channels",
    "HFTargetEngine": "targets",
    "LocalMooncake": "stores",
    "ManifestSource": "data",
    "MemoryFeatureStore": "stores",
    "MooncakeFeatureStore": "stores",
    "OfflineSource": "data",
    "OnlineSource": "producers",
    "PromptFeed": "producers",
    "RolloutWorker": "producers",
    "SharedDirFeatureStore": "stores",
    "SqliteMetadataStore": "control",
    "StrategySpec": "strategies",
    "StreamingSource": "data",
    "Watermarks": "control",
    "available_strategies": "strategies",
    "capture_to_folder": "producers",
    "export_draft": "exports",
    "latest_checkpoint": "checkpoints.markers",
    "load_prompts": "prompts",
    "load_tokenizer": "targets",
    "register_strategy": "strategies",
    "resolve_control_plane": "control",
    "resolve_strategy": "strategies",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
