"""Target engines: they read prompts and hand back the hidden states that drafts are trained on."""

from lightning_dataflow.targets.base import TargetEngine
from lightning_dataflow.targets.hf import HFTargetEngine
from lightning_dataflow.targets.info import TargetInfo, load_tokenizer, read_target_info

__all__ = ["HFTargetEngine", "TargetEngine", "TargetInfo", "load_tokenizer", "read_target_info"]
