"""Topology `online`: the target runs in the training process and captures what the next window needs."""

import secrets
from collections.abc import Sequence

from torch import Tensor

from lightning_dataflow.contracts import SampleRef
from lightning_dataflow.data.source import FeatureCard, RefSource, RefWindow, WindowEntry
from lightning_dataflow.data.windows import PassOrder
from lightning_dataflow.producers.capture import FEATURES, capture_prompts
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.stores import FeatureStore, MemoryFeatureStore
from lightning_dataflow.targets import TargetEngine


class OnlineSource(RefSource):
    """Captures on demand; every pass captures anew.

    Args:
        prompts: to train on.
        target: with its capture layers set.
        store: where features wait for the step that uses them.
        capture_batch_size: prompts per target forward pass. 1 gives the same bits in every topology; more is faster on a
            GPU, and rounds differently when the groups differ.

    Raises:
        UserError: the prompts hold tokens that the target does not know, or are longer than its positions.
    """

    prefetch_windows = 0  # a thread beside would run the target while the trainer computes on the same device

    def __init__(
        self,
        prompts: PromptDataset,
        target: TargetEngine,
        store: FeatureStore | None = None,
        *,
        capture_batch_size: int = 1,
    ):
        prompts.check_target(target.info.vocab_size, target.info.max_position_embeddings)
        self.prompts = prompts
        self.target = target
        self.store = store or MemoryFeatureStore()
        self.capture_batch_size = capture_batch_size
        self.run_id = secrets.token_hex(4)
        self.card = feature_card(prompts, target)

    def __len__(self) -> int:
        return len(self.prompts)

    def num_tokens(self, seq: int, order: PassOrder) -> int:
        """See RefSource."""
        return window_tokens(self.prompts, range(seq, seq + 1), order)

    def window(self, seqs: range, share: Sequence[int], order: PassOrder) -> RefWindow:
        """See RefSource; captures the share now."""
        version = self.target.info.model_version
        tasks = [
            self.prompts.task(index, pass_index, run_id=self.run_id, target_model_version=version)
            for index, pass_index in map(order.locate, share)
        ]
        refs: list[SampleRef] = []
        for start in range(0, len(tasks), self.capture_batch_size):
            group = tasks[start : start + self.capture_batch_size]
            refs += [self.store.put(tensors, origin) for origin, tensors in capture_prompts(group, self.target, self.card)]
        return RefWindow(
            entries=[WindowEntry(seq=seq, ref=ref) for seq, ref in zip(share, refs, strict=True)],
            num_tokens=window_tokens(self.prompts, seqs, order),
        )

    def in_flight(self) -> dict[str, int]:
        """See RefSource."""
        health = self.store.health()
        return {"refs_in_flight": health["num_samples"], "bytes_in_flight": health["num_bytes"]}

    def token_counts(self, vocab_size: int) -> Tensor:
        """See RefSource."""
        return self.prompts.token_counts(vocab_size)


def window_tokens(prompts: PromptDataset, seqs: range, order: PassOrder) -> int:
    """Tokens of a window."""
    return sum(len(prompts[order.locate(seq)[0]].input_ids) for seq in seqs)


def feature_card(prompts: PromptDataset, target: TargetEngine) -> FeatureCard:
    """What features of these prompts, captured by this target, have in common."""
    return FeatureCard(
        features=FEATURES,
        dtype=target.dtype,
        prompts_version=prompts.version,
        capture=target.capture_spec,
        target_model_version=target.info.model_version,
        tokenizer_version=target.info.tokenizer_version,
        max_num_tokens=max(len(prompt.input_ids) for prompt in prompts),
        skipped=prompts.skipped,
    )
