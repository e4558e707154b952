"""What a RolloutWorker puts into the store: prompts as the target reads them, or features captured before."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from lightning_dataflow.contracts import PromptTask, SampleOrigin, SampleRef
from lightning_dataflow.contracts.validation import DTYPE_BYTES
from lightning_dataflow.data import FeatureCard, OfflineSource, PassOrder
from lightning_dataflow.producers.capture import capture_prompts, sample_origin, verify_capture_spec
from lightning_dataflow.producers.online import feature_card
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.stores.base import Tensors
from lightning_dataflow.targets import ReferenceEngine, TargetEngine

PUT_PAUSE_S, CAPTURE_PAUSE_S = 0.1, 2.0
"""The longest between two tries where the store is full; a server reads the prompt again for each."""

Patience = Callable[[Callable[[], SampleRef], float], SampleRef]
"""Repeats what fails with CapacityError, after pauses that grow to so many seconds, for as long as room is waited for."""


class Feed(ABC):
    """Features by seq.

    Attributes:
        seed: of the order of seqs; None where seqs number the samples themselves.
    """

    card: FeatureCard
    seed: int | None

    @abstractmethod
    def __len__(self) -> int:
        """Samples in one pass."""

    @abstractmethod
    def sizes(self) -> Sequence[int]:
        """Payload in bytes of the features of every sample of a pass, known before they are captured."""

    @abstractmethod
    def num_bytes(self, seq: int) -> int:
        """Payload of the features of `seq`."""

    @abstractmethod
    def capture(self, seqs: Sequence[int], attempt: int) -> list[tuple[SampleOrigin, Tensors]]:
        """Features of one group.

        Raises:
            CaptureMismatchError: they are not what the card says.
        """

    def store(
        self,
        seqs: Sequence[int],
        attempt: int,
        wanted: Collection[int],
        store: FeatureStore,
        patiently: Patience,
    ) -> Iterator[tuple[int, SampleRef]]:
        """Capture one group and have those that are wanted in the store; yields each as soon as it is there.

        Raises:
            CaptureMismatchError: they are not what the card says.
        """
        for seq, (origin, tensors) in zip(seqs, self.capture(seqs, attempt), strict=True):
            if seq in wanted:
                yield seq, patiently(partial(store.put, tensors, origin), PUT_PAUSE_S)

    def stop_waiting(self) -> None:  # noqa: B027
        """The run is being ended: calls, those that wait already among them, no longer wait for another process."""

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
        prompts.check_target(target.info.vocab_size, target.info.max_position_embeddings)
        self.prompts = prompts
        self.target = target
        self.seed = seed
        self.run_id = run_id
        self.card = feature_card(prompts, target)
        self._locate = locate or PassOrder(len(prompts), seed).locate
        spec = target.capture_spec
        hidden = (len(spec.layer_ids) + 1) * spec.hidden_size * DTYPE_BYTES[target.dtype]
        bytes_per_token = hidden + DTYPE_BYTES["int64"] + DTYPE_BYTES["uint8"]
        self._sizes = [len(prompt.input_ids) * bytes_per_token for prompt in prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def sizes(self) -> Sequence[int]:
        """See Feed."""
        return self._sizes

    def num_bytes(self, seq: int) -> int:
        """See Feed."""
        return self._sizes[self._locate(seq)[0]]

    def capture(self, seqs: Sequence[int], attempt: int) -> list[tuple[SampleOrigin, Tensors]]:
        """See Feed."""
        return capture_prompts(self.tasks(seqs, attempt), self.target, self.card)

    def tasks(self, seqs: Sequence[int], attempt: int) -> list[PromptTask]:
        """The prompts of a group."""
        version = self.target.info.model_version
        return [
            self.prompts.task(index, pass_index, run_id=self.run_id, target_model_version=version, attempt=attempt)
            for index, pass_index in map(self._locate, seqs)
        ]

    def token_counts(self) -> torch.Tensor:
        """See Feed."""
        return self.prompts.token_counts(self.target.info.vocab_size)


class ServedFeed(PromptFeed):
    """Prompts whose features a server puts into the store: only references come here."""

    target: ReferenceEngine

    def store(
        self,
        seqs: Sequence[int],
        attempt: int,
        wanted: Collection[int],
        store: FeatureStore,
        patiently: Patience,
    ) -> Iterator[tuple[int, SampleRef]]:
        """See Feed; a server batches as it likes, so the others of a group are not captured again."""
        verify_capture_spec(self.target.capture_spec, self.card)
        for seq, task in zip(seqs, self.tasks(seqs, attempt), strict=True):
            if seq in wanted:
                prompt = (task.payload["input_ids"], task.payload["loss_mask"], sample_origin(task, self.target))
                yield seq, patiently(partial(self.target.capture_ref, *prompt), CAPTURE_PAUSE_S)

    def stop_waiting(self) -> None:
        """See Feed."""
        self.target.stop_waiting()


class FolderFeed(Feed):
    """Features that `capture` wrote to disk; seq i is sample i."""

    def __init__(self, source: OfflineSource, *, vocab_size: int, run_id: str):
        self.source = source
        self.seed = None
        self.run_id = run_id
        self.card = source.card
        self._vocab_size = vocab_size
        self._sizes = [
            sum(math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in ref.features.values())
            for ref in source.sample_refs
        ]

    def __len__(self) -> int:
        return len(self.source)

    def sizes(self) -> Sequence[int]:
        """See Feed."""
        return self._sizes

    def num_bytes(self, seq: int) -> int:
        """See Feed."""
        return self._sizes[seq]

    def capture(self, seqs: Sequence[int], attempt: int) -> list[tuple[SampleOrigin, Tensors]]:
        """See Feed; reads the files."""
        samples = []
        for ref in (self.source.sample_refs[seq] for seq in seqs):
            tensors, handle = self.source.store.get(ref)
            self.source.store.release(handle)
            name = f"{self.run_id}:{ref.origin.source_task_id}"
            samples.append((replace(ref.origin, sample_id=name, run_id=self.run_id, attempt=attempt), tensors))
        return samples

    def token_counts(self) -> torch.Tensor:
        """See Feed."""
        return self.source.token_counts(self._vocab_size)
