"""One step of every producer: capture a group of prompts, check it, put it into the store."""

from collections.abc import Mapping, Sequence

import torch

from lightning_dataflow.contracts import PromptTask, SampleOrigin, SampleRef
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.targets import TargetEngine

FEATURES = ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state")


def capture_prompts(tasks: Sequence[PromptTask], target: TargetEngine, store: FeatureStore) -> list[SampleRef]:
    """Capture `tasks` as one batch and store each sample. Raises ValueError when the engine returns something else."""
    captured = target.capture([task.payload["input_ids"] for task in tasks])
    if len(captured) != len(tasks):
        raise ValueError(f"the {target.backend} target returned {len(captured)} samples for {len(tasks)} prompts")
    return [_store(task, features, target, store) for task, features in zip(tasks, captured, strict=True)]


def _store(task: PromptTask, features: Mapping[str, torch.Tensor], target: TargetEngine, store: FeatureStore) -> SampleRef:
    num_tokens = len(task.payload["input_ids"])
    _check(task, features, target)
    tensors = {
        "input_ids": torch.tensor(task.payload["input_ids"], dtype=torch.int64),
        "loss_mask": torch.tensor(task.payload["loss_mask"], dtype=torch.uint8),
        **features,
    }
    origin = SampleOrigin(
        sample_id=f"{task.run_id}:{task.task_id}",
        run_id=task.run_id,
        source_task_id=task.task_id,
        source_id=task.source_id,
        capture=target.capture_spec,
        target_model_version=target.info.model_version,
        tokenizer_version=target.info.tokenizer_version,
        num_tokens=num_tokens,
        attempt=task.attempt,
        metadata=task.metadata,
    )
    return store.put(tensors, origin)


def _check(task: PromptTask, features: Mapping[str, torch.Tensor], target: TargetEngine) -> None:
    """A capture of another shape than asked for must not reach the store."""
    spec, length = target.capture_spec, len(task.payload["input_ids"])
    expected = {
        "aux_hidden_states": (length, len(spec.layer_ids) * spec.hidden_size),
        "last_hidden_state": (length, spec.hidden_size),
    }
    found = {name: tuple(tensor.shape) for name, tensor in features.items()}
    if found != expected:
        raise ValueError(f"the {target.backend} target captured {found} for {task.task_id}, expected {expected}")
