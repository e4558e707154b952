"""Show which tokens of a sample are supervised."""

from typing import TYPE_CHECKING

from lightning_dataflow.prompts.dataset import TokenizedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPERVISED = "\x1b[30;42m"
PLAIN = "\x1b[0m"


def render_mask(prompt: TokenizedPrompt, tokenizer: "PreTrainedTokenizerBase", *, colour: bool = True) -> str:
    """The sample's text with supervised tokens on green, or between ⟦ and ⟧ without colour."""
    start, end = (SUPERVISED, PLAIN) if colour else ("⟦", "⟧")
    pieces = []
    for supervised, ids in _runs(prompt):
        text = str(tokenizer.decode(ids))
        pieces.append(f"{start}{text}{end}" if supervised else text)
    num_supervised = sum(prompt.loss_mask)
    header = f"record {prompt.source_id}: {len(prompt.input_ids)} tokens, {num_supervised} supervised"
    return f"{header}\n{''.join(pieces)}"


def _runs(prompt: TokenizedPrompt) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for token, flag in zip(prompt.input_ids, prompt.loss_mask, strict=True):
        if not runs or runs[-1][0] != bool(flag):
            runs.append((bool(flag), []))
        runs[-1][1].append(token)
    return runs
