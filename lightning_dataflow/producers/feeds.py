"""What a RolloutWorker puts into the store: prompts that a target reads, or features captured earlier."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from lightning_dataflow.contracts import BrokenFeaturesError, NotFiniteError, PromptTask, SampleOrigin, SampleRef
from lightning_dataflow.contracts.validation import DTYPE_BYTES
from lightning_dataflow.data import FeatureCard, OfflineSource, PassOrder
from lightning_dataflow.producers.capture import capture_prompts, feature_card, sample_origin, verify_capture_spec
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.stores.base import Tensors
from lightning_dataflow.stores.finite import check_features, skip_reason
from lightning_dataflow.targets import SGLangServerTarget, TargetEngine

log = logging.getLogger(__name__)

MOST_BROKEN = 8
"""The run ends if as many samples of a target, its first, all hold NaN or infinity. The log names at most as many."""


class CapturedSample(NamedTuple):
    """A sample that is ready to be put into the store, by `Feed.put`.

    Attributes:
        put: puts it there. Raises CapacityError while the store is full, and can be called again then; and
            BrokenFeaturesError.
    """

    seq: int
    origin: SampleOrigin
    put: Callable[[FeatureStore], SampleRef]


def to_put(seq: int, origin: SampleOrigin, tensors: Tensors) -> CapturedSample:
    """A sample whose features are in this process, just captured."""

    def put(store: FeatureStore) -> SampleRef:
        check_features(tensors, origin.capture.layer_ids)
        return store.put(tensors, origin)

    return CapturedSample(seq, origin, put)


class Feed(ABC):
    """Features by seq.

    Attributes:
        seed: of the order of seqs; None if seqs number the samples themselves.
        sizes: payload in bytes of every sample of a pass, known before it is captured.
        longest_pause_s: between two tries of `put`.
    """

    card: FeatureCard
    seed: int | None
    sizes: Sequence[int]
    longest_pause_s = 0.1

    def __init__(self) -> None:
        self._has_finite = False
        self._broken: set[str] = set()  # the first few that were met

    def __len__(self) -> int:
        """Samples in one pass."""
        return len(self.sizes)

    def locate(self, seq: int) -> tuple[int, int]:
        """(index of the sample, pass)."""
        return seq, 0

    def num_bytes(self, seq: int) -> int:
        """Payload of the features of `seq`."""
        return self.sizes[self.locate(seq)[0]]

    def put(self, sample: CapturedSample, store: FeatureStore) -> SampleRef:
        """Put a sample into the store.

        Raises:
            BrokenFeaturesError: its features hold NaN or infinity. The message, the same in every topology, is why it is
                skipped.
            NotFiniteError: so do those of all samples so far, and these are MOST_BROKEN or a whole pass.
            CapacityError: the store is full.
        """
        try:
            ref = sample.put(store)
        except BrokenFeaturesError as error:
            raise self.broken(sample.origin, error) from error
        self._has_finite = True
        return ref

    def broken(self, origin: SampleOrigin, where: BrokenFeaturesError) -> BrokenFeaturesError:
        """Name a broken sample, and log the first ones. Raises NotFiniteError; see `put`."""
        reason = skip_reason(str(where), origin.source_id)
        if len(self._broken) < MOST_BROKEN and origin.sample_id not in self._broken:
            self._broken.add(origin.sample_id)
            log.warning("skipped: %s", reason)
        if not self._has_finite and len(self._broken) >= min(MOST_BROKEN, len(self)):
            raise NotFiniteError(
                f"{reason}, and so do all of the first {len(self._broken)} samples: check the target's weights, and "
                "whether its dtype (target.dtype) is wide enough"
            )
        return BrokenFeaturesError(reason)

    @abstractmethod
    def capture(self, seqs: Sequence[int], attempt: int, wanted: Collection[int]) -> Iterator[CapturedSample]:
        """Capture one group and yield those that are wanted.

        Raises:
            CaptureMismatchError: the features are not what the card says.
        """

    def stop_waiting(self) -> None:  # noqa: B027
        """The run is being ended: calls, also those in progress, no longer wait for another process."""

    @abstractmethod
    def token_counts(self) -> torch.Tensor:
        """How often each token is supervised in one pass, int64 [vocab_size]."""


class PromptFeed(Feed):
    """Captures prompts with a target, in the order of `seed`.

    Args:
        locate: seq → (index of the prompt, pass); by default PassOrder's.

    Raises:
        UserError: the prompts hold tokens that the target does not know, or are longer than its positions.
    """

    def __init__(
        self,
        prompts: PromptDataset,
        target: TargetEngine,
        *,
        seed: int,
        run_id: str,
        locate: Callable[[int], tuple[int, int]] | None = None,
    ):
        super().__init__()
        prompts.check_target(target.info.vocab_size, target.info.max_position_embeddings)
        self.prompts = prompts
        self.target = target
        self.seed = seed
        self.run_id = run_id
        self.card = feature_card(prompts, target)
        self._locate = locate or PassOrder(len(prompts), seed).locate
        hidden = sum(target.widths.values()) * DTYPE_BYTES[target.dtype]
        bytes_per_token = hidden + DTYPE_BYTES["int64"] + DTYPE_BYTES["uint8"]
        self.sizes = (prompts.lengths * bytes_per_token).tolist()

    def locate(self, seq: int) -> tuple[int, int]:
        return self._locate(seq)

    def capture(self, seqs: Sequence[int], attempt: int, wanted: Collection[int]) -> Iterator[CapturedSample]:
        captured = capture_prompts(self.tasks(seqs, attempt), self.target, self.card)
        for seq, (origin, tensors) in zip(seqs, captured, strict=True):
            if seq in wanted:
                yield to_put(seq, origin, tensors)

    def tasks(self, seqs: Sequence[int], attempt: int) -> list[PromptTask]:
        """The prompts of a group."""
        version = self.target.info.model_version
        return [
            self.prompts.task(index, pass_index, run_id=self.run_id, target_model_version=version, attempt=attempt)
            for index, pass_index in map(self.locate, seqs)
        ]

    def token_counts(self) -> torch.Tensor:
        return self.prompts.token_counts(self.target.info.vocab_size)


class ServedFeed(PromptFeed):
    """Prompts whose features a server puts into the store: only references come here."""

    target: SGLangServerTarget
    longest_pause_s = 2.0  # for each try, the server reads the prompt again

    def capture(self, seqs: Sequence[int], attempt: int, wanted: Collection[int]) -> Iterator[CapturedSample]:
        """The rest of the group is not captured again: a server forms batches of its own."""
        verify_capture_spec(self.target.capture_spec, self.card)
        for seq, task in zip(seqs, self.tasks(seqs, attempt), strict=True):
            if seq in wanted:
                origin = sample_origin(task, self.target)
                yield CapturedSample(seq, origin, partial(self._capture_ref, task, origin))

    def stop_waiting(self) -> None:
        self.target.stop_waiting()

    def _capture_ref(self, task: PromptTask, origin: SampleOrigin, store: FeatureStore) -> SampleRef:
        return self.target.capture_ref(task.payload["input_ids"], task.payload["loss_mask"], origin)


class FolderFeed(Feed):
    """Features that `capture` wrote to disk; seq i is sample i."""

    seed = None

    def __init__(self, source: OfflineSource, *, vocab_size: int, run_id: str):
        super().__init__()
        self.source = source
        self.run_id = run_id
        self.card = source.card
        self._vocab_size = vocab_size
        self.sizes = [ref.num_bytes for ref in source.refs]

    def capture(self, seqs: Sequence[int], attempt: int, wanted: Collection[int]) -> Iterator[CapturedSample]:
        """Read the files of those that are wanted. The reader of the store checks them, as that of the folder would."""
        for seq in sorted(wanted):
            ref = self.source.refs[seq]
            sample_id = f"{self.run_id}:{ref.origin.source_task_id}"
            origin = replace(ref.origin, sample_id=sample_id, run_id=self.run_id, attempt=attempt)
            if (where := self.source.broken.get(str(seq))) is not None:
                yield CapturedSample(seq, origin, partial(_refuse, where))
                continue
            tensors, handle = self.source.store.get(ref)
            self.source.store.release(handle)
            yield CapturedSample(seq, origin, partial(_put, tensors, origin))

    def token_counts(self) -> torch.Tensor:
        return self.source.token_counts(self._vocab_size)


def _put(tensors: Tensors, origin: SampleOrigin, store: FeatureStore) -> SampleRef:
    return store.put(tensors, origin)


def _refuse(where: str, store: FeatureStore) -> SampleRef:
    raise BrokenFeaturesError(where)
