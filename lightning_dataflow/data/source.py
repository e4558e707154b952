"""The contract of every source: references for the seqs of a window, and what the features are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from lightning_dataflow.contracts import CaptureSpec, SampleRef, UserError
from lightning_dataflow.contracts.foreign import one_line
from lightning_dataflow.contracts.log import MAX_SEQ
from lightning_dataflow.contracts.validation import (
    DTYPE_BYTES,
    MAX_FEATURES,
    MAX_TOKENS,
    check_capture,
    check_count,
    check_id,
    check_text,
)
from lightning_dataflow.control import ControlPlane, RunPlan
from lightning_dataflow.data.windows import PassOrder
from lightning_dataflow.stores import FeatureStore

ReleaseAt = Literal["applied", "durable"]
SKIP_REASON = "listed in skip_ids"


@dataclass(frozen=True, kw_only=True)
class FeatureCard:
    """What all features of a source have in common.

    Attributes:
        features: their names.
        dtype: of the hidden states, as torch names it, without the prefix.
        prompts_version: fingerprint of the prompts, their masks and their order.
        max_num_tokens: length of the longest sample.
        skipped: number of records, turns and samples left out before anything was captured, by reason.
        num_records: that the samples of a pass come from; None where that is not known.
    """

    features: tuple[str, ...]
    dtype: str
    prompts_version: str
    capture: CaptureSpec
    target_model_version: str
    tokenizer_version: str
    max_num_tokens: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    num_records: int | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "FeatureCard":
        """Rebuild a card from parsed JSON. Raises UserError, KeyError, TypeError or AttributeError for anything else."""
        capture = CaptureSpec(**{**data["capture"], "layer_ids": tuple(data["capture"]["layer_ids"])})
        card = cls(**{**data, "features": tuple(data["features"]), "capture": capture})
        for name in ("prompts_version", "target_model_version", "tokenizer_version"):
            check_text(getattr(card, name), f"{name} of the card")
        check_capture(capture, "of the card")
        check_count(card.max_num_tokens, 1, MAX_TOKENS, "max_num_tokens of the card")
        check_count(len(card.features), 1, MAX_FEATURES, "the number of features of the card")
        for feature in card.features:
            check_id(feature, "feature of the card")
        for reason, count in card.skipped.items():
            check_count(count, 0, MAX_SEQ, f"skipped of the card, {one_line(reason, 60)},")
        if card.dtype not in DTYPE_BYTES:
            raise UserError(f"dtype of the card is {str(card.dtype)[:80]}, known: {', '.join(DTYPE_BYTES)}")
        return card

    def check_ref(self, ref: SampleRef) -> None:
        """Raise UserError, before memory is taken for it, for a ref to other features than these."""
        wrong, size = None, self.capture.hidden_size
        widths = {"aux_hidden_states": (len(self.capture.layer_ids) * size,), "last_hidden_state": (size,)}
        if ref.num_tokens > self.max_num_tokens:
            wrong = f"has {ref.num_tokens} tokens, the longest sample has {self.max_num_tokens}"
        elif set(ref.features) != set(self.features):
            wrong = f"has the features {', '.join(ref.features)}, captured are {', '.join(self.features)}"
        for name, spec in ref.features.items():
            if name in widths and (spec.shape[1:], spec.dtype) != (widths[name], self.dtype):
                wrong = (
                    f"has {name} of {list(spec.shape)} {spec.dtype}, expected: {widths[name][0]} columns of {self.dtype}"
                )
            elif name not in widths and len(spec.shape) > 1:
                wrong = f"has {name} of {list(spec.shape)}, expected is one value a token"
        if wrong is not None:
            raise UserError(f"ref {ref.sample_id} {wrong}: the ref is damaged, or of another run; capture the sample again")


@dataclass(frozen=True, kw_only=True)
class RefWindow:
    """A rank's share of one window.

    Attributes:
        refs: in the order of the share. None stands for a skipped sample, which keeps its place with zero loss weight.
        num_tokens: tokens of the whole window, the same on every rank. Listed samples (`skip_ids`) count.
    """

    refs: Sequence[SampleRef | None]
    num_tokens: int


class RefSource(ABC):
    """Where refs come from: captured on demand, listed by a manifest, or streamed from other processes.

    Attributes:
        card: what the features are.
        store: where they are.
        plane: where the run is coordinated; with a NoOpMetadataStore, nothing is.
        order: which sample each seq is; set by the DataModule.
        prefetch_windows: how many windows are worth reading ahead.
        shares_any_seqs: whether a rank's share may be any seqs of a window; otherwise it must be the rank's slice of it.
        release_at: whether features are freed when their step is `applied`, or when a checkpoint made it `durable`.
        resumable: whether this fit writes checkpoints; set before `begin`.
        skip_ids: source ids of samples that are not trained; set before `begin`.
        sees_all_skips: whether `skipped` is of all ranks; otherwise of those that this rank captured.
    """

    card: FeatureCard
    store: FeatureStore
    plane: ControlPlane
    order: PassOrder
    prefetch_windows: int = 1
    shares_any_seqs: bool = True
    release_at: ReleaseAt = "applied"
    resumable: bool = True
    skip_ids: frozenset[str] = frozenset()
    sees_all_skips: bool = True
    _skipped: Mapping[int, str] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int:
        """Samples in one pass."""

    @abstractmethod
    def num_tokens(self, seq: int) -> int:
        """Length of the sample at `seq`, the same on every rank; 0 if it was given up. Blocks until it is known."""

    @abstractmethod
    def window(self, seqs: range, share: Sequence[int]) -> RefWindow:
        """The refs of `share`, this rank's part of the window `seqs`. Blocks until the whole window is available."""

    @abstractmethod
    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is supervised in one pass, int64 [vocab_size]."""

    def in_flight(self) -> dict[str, int]:
        """`refs_in_flight` and `bytes_in_flight`: captured and not yet trained. Cheap."""
        num_refs, num_bytes = self.plane.ledger.in_flight()
        return {"refs_in_flight": num_refs, "bytes_in_flight": num_bytes}

    def check_order(self) -> None:  # noqa: B027
        """Raise UserError when `order` is not that of the producers. Every rank calls it before any waits for another."""

    def begin(self, plan: RunPlan, rank: int, world_size: int) -> None:
        """A fit starts. Rank 0 calls it first."""
        self._skipped = {}

    def replace(self, seq: int, ref: SampleRef, reason: str) -> SampleRef | None:
        """What to train instead of a ref whose features are gone, if anything. Blocks while they are captured again.

        Raises UserError if nobody can capture them again.
        """
        raise UserError(f"a sample is lost: {reason}; capture again")

    def frees_at_end(self) -> bool:
        """Whether this rank frees what it read and did not use when a fit ends.

        Otherwise rank 0 does, or the process that has taken over the run. A rank that fails because rank 0 died leaves its
        features to the resume.
        """
        return True

    def discard(self, refs: Sequence[SampleRef]) -> None:
        """The refs will not be read in this pass."""
        self.free(refs)

    def free(self, refs: Sequence[SampleRef]) -> None:
        """Free features for good."""
        for ref in refs:
            self.store.free(ref)

    def applied(self, seqs: Sequence[int], next_seq: int, global_step: int) -> None:
        """The step that used everything before `next_seq` has run; this rank freed the features of `seqs`, if any."""
        self.plane.ledger.ack(next_seq, global_step, seqs)

    def must_save(self) -> bool:
        """Whether a checkpoint must be written now, so that features can be freed. The same on every rank."""
        return False

    def durable(self, next_seq: int, global_step: int, freed: Sequence[int] = ()) -> None:
        """A complete checkpoint holds that step; this rank freed the features of `freed`."""
        self.plane.ledger.ack_durable(next_seq, global_step)

    def cancel(self) -> None:  # noqa: B027
        """Make a `window` or `replace` that blocks in another thread end."""

    def finish(self, status: str) -> None:
        """The fit ended: free whatever was captured and never read."""
        self.plane.ledger.finish(status)

    def skipped(self) -> dict[int, str]:
        """A copy: seqs that kept their places without features, with the reasons."""
        return dict(self._skipped)

    def recaptured(self) -> Sequence[int]:
        """Seqs that were captured again because their features were lost."""
        return ()


class IndexedSource(RefSource):
    """A source that knows its samples by index, so that it can tell without a log which ones are listed in `skip_ids`.

    Attributes:
        source_ids: the name of each sample, the same in every topology.
        lengths: of each sample, in tokens.
    """

    source_ids: Sequence[str]
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.lengths)

    def num_tokens(self, seq: int) -> int:
        return self.lengths[self.order.locate(seq)[0]]

    def make_window(
        self, seqs: range, refs: Mapping[int, SampleRef | None], broken: Mapping[int, str] = MappingProxyType({})
    ) -> RefWindow:
        """A rank's share, `refs` by seq, without those that are listed, which are freed, and those that are broken.

        Args:
            broken: seq → why it is skipped, of samples whose features hold NaN or infinity.
        """
        listed = {seq: SKIP_REASON for seq in seqs if self.source_ids[self.order.locate(seq)[0]] in self.skip_ids}
        self._skipped = {**self._skipped, **listed, **broken}
        self.discard([ref for seq, ref in refs.items() if seq in listed and ref is not None])
        kept = [None if seq in listed or seq in broken else ref for seq, ref in refs.items()]
        return RefWindow(refs=kept, num_tokens=sum(map(self.num_tokens, seqs)))
