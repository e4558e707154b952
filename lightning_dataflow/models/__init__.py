"""Draft networks, as plain `nn.Module`s, and the target's frozen tensors that they borrow."""

from lightning_dataflow.models.dflash import DFlashConfig, DFlashDraft
from lightning_dataflow.models.domino import DominoConfig, DominoDraft
from lightning_dataflow.models.draft_vocab import DraftVocab, build_draft_vocab
from lightning_dataflow.models.eagle3 import Eagle3Config, Eagle3Draft
from lightning_dataflow.models.target_tensors import FrozenTarget

__all__ = [
    "DFlashConfig",
    "DFlashDraft",
    "DominoConfig",
    "DominoDraft",
    "DraftVocab",
    "Eagle3Config",
    "Eagle3Draft",
    "FrozenTarget",
    "build_draft_vocab",
]
