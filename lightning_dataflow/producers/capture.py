"""Captures a group of prompts and checks that the features are what the run was announced with."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from lightning_dataflow.contracts import CaptureMismatchError, CaptureSpec, PromptTask, SampleOrigin
from lightning_dataflow.data.source import FeatureCard
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.stores.base import Tensors, dtype_name
from lightning_dataflow.targets import TargetEngine

FROM_PROMPT = ("input_ids", "loss_mask")
"""Features that come with the prompt; the others are captured."""


def capture_prompts(
    tasks: Sequence[PromptTask], target: TargetEngine, card: FeatureCard
) -> list[tuple[SampleOrigin, Tensors]]:
    """Capture `tasks` as one batch.

    Raises:
        CaptureMismatchError: the engine returned other features than `card` says. The message names the difference.
    """
    verify_capture_spec(target.capture_spec, card)
    captured = target.capture([task.payload["input_ids"] for task in tasks])
    if len(captured) != len(tasks):
        raise CaptureMismatchError(f"the {target.backend} target returned {len(captured)} samples for {len(tasks)} prompts")
    samples = []
    for task, features in zip(tasks, captured, strict=True):
        _verify(task, features, target, card)
        from_prompt = {
            "input_ids": torch.tensor(task.payload["input_ids"], dtype=torch.int64),
            "loss_mask": torch.tensor(task.payload["loss_mask"], dtype=torch.uint8),
        }
        samples.append((sample_origin(task, target), from_prompt | features))
    return samples


def verify_capture_spec(spec: CaptureSpec, card: FeatureCard) -> None:
    """Raise CaptureMismatchError if a target captures other layers, another width or another norm than was announced."""
    announced = asdict(card.capture)
    for name, value in asdict(spec).items():
        if value != announced[name]:
            raise CaptureMismatchError(
                f"the target captures {name}={value!r}, the run was announced with {name}={announced[name]!r}: give the "
                "producer the settings of the run"
            )


def sample_origin(task: PromptTask, target: TargetEngine) -> SampleOrigin:
    """The description of a sample, before it is stored."""
    return SampleOrigin(
        sample_id=f"{task.run_id}:{task.task_id}",
        run_id=task.run_id,
        source_task_id=task.task_id,
        source_id=task.source_id,
        capture=target.capture_spec,
        target_model_version=target.info.model_version,
        tokenizer_version=target.info.tokenizer_version,
        num_tokens=len(task.payload["input_ids"]),
        attempt=task.attempt,
        metadata=task.metadata,
    )


def _verify(task: PromptTask, features: Mapping[str, torch.Tensor], target: TargetEngine, card: FeatureCard) -> None:
    """Raise CaptureMismatchError for a shape or dtype other than announced, before it reaches the store."""
    length, widths = len(task.payload["input_ids"]), target.widths
    expected = {name: ((length, widths.get(name)), card.dtype) for name in card.features if name not in FROM_PROMPT}
    actual = {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in features.items()}
    if actual != expected:
        raise CaptureMismatchError(f"the {target.backend} target captured {actual} for {task.task_id}, expected {expected}")


def feature_card(prompts: PromptDataset, target: TargetEngine) -> FeatureCard:
    """What features of these prompts, captured by this target, have in common."""
    return FeatureCard(
        features=(*FROM_PROMPT, *target.features),
        dtype=target.dtype,
        prompts_version=prompts.version,
        capture=target.capture_spec,
        target_model_version=target.info.model_version,
        tokenizer_version=target.info.tokenizer_version,
        max_num_tokens=int(prompts.lengths.max()),
        skipped=prompts.skipped,
        num_records=prompts.num_records,
    )
