"""Show which tokens of a sample are supervised."""

from itertools import groupby
from operator import itemgetter
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
    for supervised, tokens in groupby(zip(prompt.loss_mask, prompt.input_ids, strict=True), itemgetter(0)):
        text = str(tokenizer.decode([token for _, token in tokens]))
        pieces.append(f"{start}{text}{end}" if supervised else text)
    num_supervised = sum(prompt.loss_mask)
    header = f"record {prompt.source_id}: {len(prompt.input_ids)} tokens, {num_supervised} supervised"
    return f"{header}\n{''.join(pieces)}"
