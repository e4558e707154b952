"""Small samples for all store tests."""

import torch

from lightning_dataflow.contracts import CaptureSpec, SampleOrigin


def origin(sample_id: str = "run:1", num_tokens: int = 4) -> SampleOrigin:
    return SampleOrigin(
        sample_id=sample_id,
        run_id="run",
        source_task_id="1",
        source_id="1",
        capture=CaptureSpec(layer_ids=(0,), norm="post", hidden_size=8),
        target_model_version="m",
        tokenizer_version="t",
        num_tokens=num_tokens,
    )


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 8), value), "b": torch.arange(4)}
