"""What the DataModule asks of a topology: references for the seqs of a window, and what the features are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from lightning_dataflow.contracts import CaptureSpec, SampleRef, UserError
from lightning_dataflow.control import RunPlan
from lightning_dataflow.data.windows import PassOrder
from lightning_dataflow.stores import FeatureStore

ReleaseAt = Literal["applied", "durable"]


@dataclass(frozen=True, kw_only=True)
class FeatureCard:
    """What all features of a source have in common.

    Attributes:
        features: their names.
        dtype: of the hidden states, torch's name without the prefix.
        prompts_version: fingerprint of the prompts, their masks and their order.
        max_num_tokens: of the longest sample.
        skipped: records left out before anything was captured, by reason.
    """

    features: tuple[str, ...]
    dtype: str
    prompts_version: str
    capture: CaptureSpec
    target_model_version: str
    tokenizer_version: str
    max_num_tokens: int
    skipped: Mapping[str, int] = field(default_factory=dict)


class WindowEntry(NamedTuple):
    """One seq of a window; `ref` is None where it was skipped and keeps its place with zero loss weight."""

    seq: int
    ref: SampleRef | None


@dataclass(frozen=True, kw_only=True)
class RefWindow:
    """A rank's share of one window.

    Attributes:
        entries: in the order of the share.
        num_tokens: of the whole window, the same on every rank.
    """

    entries: Sequence[WindowEntry]
    num_tokens: int


class RefSource(ABC):
    """Where refs come from: captured on demand, listed by a manifest, or streamed from other processes.

    Attributes:
        card: what the features are.
        store: where they are.
        prefetch_windows: how many windows are worth reading ahead.
        shares_any_seqs: whether a rank's share may be any seqs of a window, or else must be the rank's slice of it.
        release_at: whether features are freed when their step is `applied`, or when a checkpoint made it `durable`.
        resumable: whether this fit writes checkpoints; set before `begin`.
    """

    card: FeatureCard
    store: FeatureStore
    prefetch_windows: int = 1
    shares_any_seqs: bool = True
    release_at: ReleaseAt = "applied"
    resumable: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Samples in one pass."""

    @abstractmethod
    def num_tokens(self, seq: int, order: PassOrder) -> int:
        """Length of the sample at `seq`, the same on every rank; 0 where it was skipped. Blocks until it is known."""

    @abstractmethod
    def window(self, seqs: range, share: Sequence[int], order: PassOrder) -> RefWindow:
        """The refs of `share`, this rank's part of the window `seqs`; blocks until the whole window is there."""

    @abstractmethod
    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is supervised in one pass, int64 [vocab_size]."""

    @abstractmethod
    def in_flight(self) -> dict[str, int]:
        """`refs_in_flight` and `bytes_in_flight`: captured and not yet trained. Cheap."""

    def check_order(self, order: PassOrder) -> None:  # noqa: B027
        """Raise UserError when this source counts seqs in another order."""

    def begin(self, plan: RunPlan, rank: int, world_size: int) -> None:  # noqa: B027
        """A fit starts. Rank 0 calls it first."""

    def replace(self, entry: WindowEntry, reason: str) -> WindowEntry:
        """What to train instead of a ref whose features are gone; blocks while they are captured again.

        Raises UserError where nobody captures again.
        """
        raise UserError(f"a sample is lost: {reason}; capture again")

    def frees_at_end(self) -> bool:
        """Whether this rank frees what it read and did not use when a fit ends.

        Else somebody else does: rank 0 for all, or, of a run that another process has taken over, that one. A rank that
        fails because rank 0 died leaves its features to the resume.
        """
        return True

    def discard(self, refs: Sequence[SampleRef]) -> None:
        """Give back refs that nobody will read."""
        for ref in refs:
            self.store.free(ref)

    def applied(self, seqs: Sequence[int], next_seq: int, global_step: int) -> None:  # noqa: B027
        """The step that used everything before `next_seq` has run; this rank freed the features of `seqs`, if any."""

    def must_save(self) -> bool:
        """Whether a checkpoint must be written now, so that features can be freed. The same on every rank."""
        return False

    def durable(self, next_seq: int, global_step: int, freed: Sequence[int] = ()) -> None:  # noqa: B027
        """A complete checkpoint holds that step; this rank freed the features of `freed`."""

    def cancel(self) -> None:  # noqa: B027
        """Make a `window` or `replace` that blocks in another thread end."""

    def finish(self, status: str) -> None:  # noqa: B027
        """The fit ended: whatever was captured and never read is freed."""

    def skipped(self) -> Mapping[int, str]:
        """Seqs that kept their places without features, with the reasons."""
        return {}

    def num_recaptured(self, below: int | None = None) -> int:
        """Samples (with seqs below that) that were captured again because their features were lost."""
        return 0
