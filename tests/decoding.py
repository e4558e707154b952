"""The target's own output, as tests compare with it."""

from collections.abc import Sequence

import torch

from lightning_dataflow.evaluation.loop import NoDrafter, SpeculativeDecoder
from lightning_dataflow.targets import HFTargetEngine


def greedy_decode(target: HFTargetEngine, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """One token a forward pass."""
    return SpeculativeDecoder(target, NoDrafter()).generate(prompt, max_new_tokens).tokens


def second_token_chi_square(
    target: HFTargetEngine, decoder: SpeculativeDecoder, question: Sequence[int], *, num_trials: int, num_tokens: int
) -> float:
    """How far the second token of many runs, the first that was drafted, is from the target's exact distribution of it.

    Pearson's χ² of its `num_tokens` most likely values and all others together, so with that many degrees of freedom.
    """
    counts = torch.zeros(320)
    for _ in range(num_trials):
        counts[decoder.generate(question, 2).tokens[-1]] += 1
    with torch.no_grad():
        first = torch.softmax(target.model(torch.tensor([question])).logits[0, -1] / decoder.temperature, -1)
        continued = torch.tensor([[*question, token] for token in range(320)])
        exact = torch.softmax(target.model(continued).logits[:, -1] / decoder.temperature, -1)
    for token in target.eos_token_ids:  # an end token is the last
        exact[token] = torch.nn.functional.one_hot(torch.tensor(token), 320)
    second = first @ exact
    top = second.topk(num_tokens).indices
    expected = torch.cat((second[top], 1 - second[top].sum(0, keepdim=True))) * num_trials
    observed = torch.cat((counts[top], num_trials - counts[top].sum(0, keepdim=True)))
    return ((observed - expected) ** 2 / expected).sum().item()
