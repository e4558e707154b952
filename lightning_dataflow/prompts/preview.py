"""Show which tokens of records are supervised, and why others are not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import printable
from lightning_dataflow.prompts.encoding import EncodedSample, Encoder
from lightning_dataflow.prompts.sources import Record
from lightning_dataflow.prompts.template import Unusable
from lightning_dataflow.prompts.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPERVISED = "\x1b[30;42m"
PLAIN = "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What becomes of a record.

    Attributes:
        reason: why the record is left out.
    """

    where: str
    samples: Sequence[EncodedSample] = ()
    turns: Sequence[Turn] = ()
    reason: str | None = None

    def as_text(self, tokenizer: "PreTrainedTokenizerBase", *, colour: bool = True) -> str:
        """The samples, supervised tokens on green or between ⟦ and ⟧, and why turns are not supervised."""
        if self.reason is not None:
            return f"{self.where}: left out: {printable(self.reason)}"
        blocks = [_sample_as_text(self.where, sample, tokenizer, colour) for sample in self.samples]
        reasons = [
            f"{self.where}, message {turn.index + 1}: not supervised: {printable(turn.reason)}"
            for turn in self.turns
            if turn.reason
        ]
        return "\n\n".join([*blocks, *reasons])

    def as_json(self) -> Iterator[dict[str, Any]]:
        """A row for each turn: `line`, `turn` (index of its message), `spans` of tokens, [start, end), and `reason`."""
        supervised = [turn for turn in self.turns if turn.reason is None]
        for sample in self.samples:
            taught = [turn.index for turn in supervised] if sample.turn is None else [sample.turn]
            for number, span in enumerate(sample.spans):
                is_empty = span[0] == span[1]
                yield {
                    "line": self.where,
                    "turn": taught[number] if number < len(taught) else None,
                    "num_tokens": len(sample.input_ids),
                    "spans": [] if is_empty else [list(span)],
                    "reason": "nothing supervised" if is_empty else None,
                }
        for turn in self.turns:
            if turn.reason is not None:
                yield {"line": self.where, "turn": turn.index, "num_tokens": 0, "spans": [], "reason": turn.reason}
        if self.reason is not None:
            yield {"line": self.where, "turn": None, "num_tokens": 0, "spans": [], "reason": self.reason}


def preview_record(encoder: Encoder, record: Record, format: str = "auto") -> Preview:
    """What becomes of a record. Raises UserError if the chat template is missing or not valid."""
    try:
        sample = encoder.read(record, format)
    except UserError as error:
        return Preview(where=record.where, reason=str(error).removeprefix(f"{record.where}: "))
    try:
        samples, turns = encoder.encode(sample)
    except Unusable as reason:
        return Preview(where=record.where, reason=str(reason))
    return Preview(where=record.where, samples=samples, turns=turns)


def _sample_as_text(where: str, sample: EncodedSample, tokenizer: "PreTrainedTokenizerBase", colour: bool) -> str:
    start, end = (SUPERVISED, PLAIN) if colour else ("⟦", "⟧")
    pieces = []
    for supervised, tokens in groupby(
        zip(sample.loss_mask.tolist(), sample.input_ids.tolist(), strict=True), itemgetter(0)
    ):
        text = printable(str(tokenizer.decode([token for _, token in tokens])))
        pieces.append(f"{start}{text}{end}" if supervised else text)
    turn = "" if sample.turn is None else f", message {sample.turn + 1}"
    header = f"{where}{turn}: {len(sample.input_ids)} tokens, {int(sample.loss_mask.sum())} supervised"
    return f"{header}\n{''.join(pieces)}"
