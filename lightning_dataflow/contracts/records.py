"""Frozen records that cross between parts. They hold plain data: a ref describes tensors and never carries one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 3
OLD_SCHEMA_VERSION = 2
"""Of release 0.1."""

TargetRepr = Literal["logits", "pruned_logits", "hidden_state"]


@dataclass(frozen=True, kw_only=True)
class PromptTask:
    """One prompt to capture.

    Attributes:
        task_id: unique in the run; two passes over one prompt are two tasks.
        source_id: the prompt's name in its data set; the same in every pass. Random draws are keyed by it.
        payload: `{"input_ids": [...], "loss_mask": [...]}` once tokenised; conversation or text before.
        max_length: truncation in tokens.
        attempt: grows by one each time the task is leased again.
    """

    task_id: str
    run_id: str
    source_id: str
    payload: Mapping[str, Any]
    max_length: int
    chat_template: str | None = None
    target_model_version: str = "unknown"
    attempt: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Shape and dtype of one stored tensor: enough for a reader to allocate without a header.

    Attributes:
        dtype: torch's name without the prefix, for example `bfloat16`.
        target_repr: what a feature says about the target's distribution; None for other features.
        target_meta: for `pruned_logits`, the version of the vocabulary map.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    target_repr: TargetRepr | None = None
    target_meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CaptureSpec:
    """What was captured, in strategy-neutral terms.

    Attributes:
        layer_ids: ascending; id i is the output of decoder layer i, counted from 0.
        norm: `post` when `last_hidden_state` is after the final norm, `pre` when before.
        hidden_size: the target's hidden size.
    """

    layer_ids: tuple[int, ...]
    norm: Literal["post", "pre"]
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class SampleOrigin:
    """What a producer knows of a sample before it is stored; the store adds where and how big."""

    sample_id: str
    run_id: str
    source_task_id: str
    source_id: str
    capture: CaptureSpec
    target_model_version: str
    tokenizer_version: str
    num_tokens: int
    attempt: int = 0
    draft_weight_version: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SampleRef:
    """Where the features of one sample are. Valid for one generation: a re-put makes older refs stale.

    Attributes:
        uri: the store, for example `memory://3f…` or `shared_dir://3f…`.
        generation: `attempt-nonce`; attempts order, nonces are never used twice.
        features: specs by feature name.
        num_bytes: payload of all features.
    """

    origin: SampleOrigin
    uri: str
    generation: str
    features: Mapping[str, FeatureSpec]
    num_bytes: int
    schema_version: int = SCHEMA_VERSION

    @property
    def sample_id(self) -> str:
        """Unique in the run."""
        return self.origin.sample_id

    @property
    def num_tokens(self) -> int:
        """Length of the sample in tokens."""
        return self.origin.num_tokens


@dataclass(frozen=True, kw_only=True)
class FeatureHandle:
    """What `FeatureStore.get` returns beside the tensors and `FeatureStore.release` needs."""

    sample_id: str
    generation: str
    lease_token: str


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Where a run stands, in optimizer steps; all micro-batches of one accumulation window see the same value."""

    global_step: int
    total_steps: int | None = None
    """The trainer's max_steps; None when the run has no such limit."""
