"""A reduced draft vocabulary: the target tokens that matter most, and the maps between the two numberings."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dataflow.contracts import UserError


@dataclass(frozen=True, kw_only=True)
class DraftVocab:
    """Maps between draft ids and target ids.

    Attributes:
        d2t: int64 [V_d], **offsets**: target id = draft id + d2t[draft id].
        t2d: bool [V], whether a target id is in the draft vocabulary.
    """

    d2t: Tensor
    t2d: Tensor

    @property
    def target_ids(self) -> Tensor:
        """Target id of every draft id, ascending, int64 [V_d]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def version(self) -> str:
        """16 hex digits that tell one map from another."""
        return hashlib.sha256(self.d2t.cpu().numpy().tobytes()).hexdigest()[:16]


def build_draft_vocab(token_counts: Tensor, size: int) -> DraftVocab:
    """Keep the `size` most frequent tokens of `token_counts` (int64 [V]); ties go to the lower id.

    Raises UserError when `size` is not between 1 and V.
    """
    vocab_size = len(token_counts)
    check_draft_vocab_size(size, vocab_size)
    most_frequent = torch.sort(token_counts, descending=True, stable=True).indices[:size]
    target_ids = most_frequent.sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    return DraftVocab(d2t=target_ids - torch.arange(size), t2d=t2d)


def check_draft_vocab_size(size: int, vocab_size: int) -> None:
    """Raise UserError when no vocabulary of `size` tokens can be cut from one of `vocab_size`."""
    if not 1 <= size <= vocab_size:
        raise UserError(
            f"draft_vocab_size={size}: the target's vocabulary has {vocab_size} tokens, choose 1 to {vocab_size} "
            "(or leave it out for all of them)"
        )
