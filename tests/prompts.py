"""Data sets of chosen prompts."""

from collections.abc import Iterable

import numpy as np

from lightning_dataflow.prompts.dataset import NO_TURN, SAMPLE, PromptArrays, PromptDataset, TokenizedPrompt


def data_set(prompts: Iterable[TokenizedPrompt], max_length: int = 128) -> PromptDataset:
    """These prompts, in this order, under their own names."""
    chosen = list(prompts)
    samples, end = np.zeros(len(chosen), dtype=SAMPLE), 0
    for index, prompt in enumerate(chosen):
        end += len(prompt.input_ids)
        record, _, turn = prompt.source_id.partition("-t")
        samples[index] = (end, int(record), int(turn or NO_TURN))
    arrays = PromptArrays(
        input_ids=np.array([token for prompt in chosen for token in prompt.input_ids], dtype=np.int32),
        loss_mask=np.array([flag for prompt in chosen for flag in prompt.loss_mask], dtype=np.uint8),
        samples=samples,
    )
    return PromptDataset(arrays=arrays, max_length=max_length)
