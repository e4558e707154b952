"""Target engines: they read prompts and hand back the hidden states that drafts are trained on."""

from lightning_dataflow.targets.base import TargetEngine
from lightning_dataflow.targets.hf import HFTargetEngine
from lightning_dataflow.targets.info import TargetInfo, load_tokenizer, read_target_info, trust_remote_code
from lightning_dataflow.targets.sglang_server import SGLangServerTarget

__all__ = [
    "HFTargetEngine",
    "SGLangServerTarget",
    "TargetEngine",
    "TargetInfo",
    "load_tokenizer",
    "read_target_info",
    "trust_remote_code",
]
