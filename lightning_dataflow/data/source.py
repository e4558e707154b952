"""What the DataModule asks of a topology: references for seqs, and what the features are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lightning_dataflow.contracts import CaptureSpec, SampleRef
from lightning_dataflow.stores import FeatureStore


@dataclass(frozen=True, kw_only=True)
class FeatureCard:
    """What all features of a source have in common.

    Attributes:
        features: their names.
        prompts_version: fingerprint of the prompts, their masks and their order.
        skipped: records left out before anything was captured, by reason.
    """

    features: tuple[str, ...]
    prompts_version: str
    capture: CaptureSpec
    target_model_version: str
    tokenizer_version: str
    skipped: Mapping[str, int] = field(default_factory=dict)


class RefSource(Protocol):
    """Where refs come from: captured on demand (`online`), or listed by a manifest (`offline`)."""

    card: FeatureCard

    @property
    def store(self) -> FeatureStore:
        """Where the features are."""
        ...

    def __len__(self) -> int:
        """Samples in one pass."""
        ...

    def num_tokens(self, index: int) -> int:
        """Length of one sample, known before it is captured."""
        ...

    def refs(self, samples: Sequence[tuple[int, int]]) -> list[SampleRef]:
        """Refs of (index, pass) pairs, in their order; their features are in `store`."""
        ...

    def discard(self, refs: Sequence[SampleRef]) -> None:
        """Give back refs that nobody will read."""
        ...

    def in_flight(self) -> dict[str, int]:
        """`refs_in_flight` and `bytes_in_flight`: captured and not yet trained. Cheap."""
        ...

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is supervised in one pass, int64 [vocab_size]."""
        ...
