"""Token ids and loss masks of records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.records import Conversation, PlainText, Sample, normalise
from lightning_dataflow.prompts.sources import Record
from lightning_dataflow.prompts.template import ChatTemplate, Unusable
from lightning_dataflow.prompts.template_source import check_roles
from lightning_dataflow.prompts.tokens import Tokens
from lightning_dataflow.prompts.turns import TURNS, RenderedSample, Turn, check_nothing_is_dropped, find_turns, to_samples

SPACE = "Ġ"
"""A space in the vocabularies of byte-level tokenizers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSample:
    """Token ids, int32 [S], and loss mask, uint8 [S].

    Attributes:
        spans: of supervised tokens, [start, end), one for each turn; (0, 0) if no token lies in its answer alone.
        turn: as in RenderedSample.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    spans: tuple[tuple[int, int], ...]
    turn: int | None = None


class Encoder:
    """Turns records into samples.

    Args:
        template: of a fast tokenizer (character offsets are needed).
        turns: which turns of a conversation become samples; see `to_samples`.
    """

    def __init__(self, template: ChatTemplate, turns: str = "auto"):
        if turns not in TURNS:
            raise UserError(f"data.turns={turns} is unknown: use one of {', '.join(TURNS)}")
        if not template.tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {template.tokenizer.name_or_path} is not a fast one, which tells where tokens are in the "
                "text: give input_ids and loss_mask"
            )
        self.template, self.tokenizer, self.turns = template, template.tokenizer, turns
        self._swallowing = [index for index, token in self.tokenizer.added_tokens_decoder.items() if token.rstrip]
        """Tokens that take the white space after them, as those that end turns do in some tokenizers."""

    @cached_property
    def num_ids(self) -> int:
        """The tokenizer's token ids are below this."""
        return 1 + max(self.tokenizer.get_vocab().values(), default=-1)

    def read(self, record: Record, format: str) -> Sample:
        """The record in one of three shapes. Raises UserError, which names its file and line, if it is broken."""
        if isinstance(record.data, UserError):
            raise record.data
        sample = normalise(record.data, format, record.where)
        try:
            if isinstance(sample, Tokens):
                self.check_ids(sample.input_ids)
            elif isinstance(sample, Conversation):
                check_roles(sample.messages, self.template.sources)
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from error
        return sample

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise UserError for a token id that the tokenizer does not have."""
        if unknown := [token for token in ids if token >= self.num_ids]:
            raise UserError(
                f"input_ids has {unknown[0]}, and the ids of the tokenizer end at {self.num_ids - 1}: "
                "give ids of the target's own tokenizer"
            )

    def encode(self, record: Sample) -> tuple[list[EncodedSample], list[Turn]]:
        """Samples of a record, and all assistant turns of a conversation.

        Raises:
            Unusable: nothing of the record can be trained on.
            UserError: there is no chat template.
        """
        if isinstance(record, Tokens):
            return [_to_sample(record.input_ids, record.loss_mask, [np.flatnonzero(record.loss_mask)])], []
        if isinstance(record, PlainText):
            sample = RenderedSample(text=record.text, spans=((record.start, len(record.text)),))
            has_start = record.text.startswith(self.tokenizer.bos_token or "\0")  # rendered before, so not begun twice
            return [self._tokenize(sample, add_special_tokens=not has_start)], []
        turns = find_turns(self.template, record)
        samples = to_samples(self.template, record, turns, self.turns)
        if not samples:
            raise Unusable(turns[-1].reason or "no supervised turn")
        return [self._tokenize(sample) for sample in samples], turns

    def encode_question(self, question: Conversation) -> list[int]:
        """Token ids of the messages and the generation prompt; of the last text alone where there is no chat template."""
        if not self.template.exists:
            return list(self.tokenizer(question.messages[-1]["content"])["input_ids"])
        check_roles(question.messages, self.template.sources)
        check_nothing_is_dropped(self.template, question)
        rendered = self.template.render(question, question.messages, prompt=True)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _tokenize(self, sample: RenderedSample, *, add_special_tokens: bool = False) -> EncodedSample:
        """A token is supervised if it lies in a span: one that crosses the border to the prompt is not.

        Tokens that stand for no character, such as the space that SentencePiece puts after a special token, belong to what
        follows them. The tokenizer's own at the borders of the text are nobody's answer.
        """
        if not is_unicode(sample.text):
            raise Unusable("the text holds half of a surrogate pair, which is no character")
        encoded = self.tokenizer(sample.text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        starts, ends = token_spans(encoded["offset_mapping"], encoded.tokens)
        _divide_bytes(starts, ends, sample.text)
        for index in np.flatnonzero(np.isin(encoded["input_ids"], self._swallowing)):
            ends[index] = starts[index] + len(sample.text[starts[index] : ends[index]].rstrip())
        inside = [(starts >= first) & (ends <= last) & (starts < last) for first, last in sample.spans]
        if add_special_tokens:
            inside = [span & [sequence is not None for sequence in encoded.sequence_ids()] for span in inside]
        return _to_sample(
            encoded["input_ids"], np.any(inside, axis=0), [np.flatnonzero(span) for span in inside], sample.turn
        )


def _to_sample(
    ids: Sequence[int], mask: Any, supervised: Sequence[npt.NDArray[np.int64]], turn: int | None = None
) -> EncodedSample:
    """`supervised` are the positions of each turn's tokens."""
    return EncodedSample(
        input_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.array(mask, dtype=np.uint8),
        spans=tuple((int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0) for found in supervised),
        turn=turn,
    )


def token_spans(
    offsets: Sequence[tuple[int, int]], tokens: Callable[[], Sequence[str]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(starts, ends) of the characters of each token, with the spaces that some tokenizers leave out of their offsets.

    Tokens that are parts of one character all have that character.

    Args:
        tokens: the tokens as the vocabulary writes them.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T.copy()
    reached = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    starts = np.where(starts < ends, starts, np.minimum(starts, reached))  # a token of nothing but spaces
    gaps = np.flatnonzero(starts > reached)
    for index in gaps:
        token = tokens()[int(index)]
        starts[index] = max(reached[index], starts[index] - (len(token) - len(token.lstrip(SPACE))))
    return starts, ends


def _divide_bytes(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], text: str) -> None:
    """Give each token of a byte its own character, where the tokens of several unknown characters share their offsets."""
    alike = (starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1]) & (ends[1:] - starts[1:] > 1)
    for first in np.flatnonzero(alike & ~np.concatenate([[False], alike[:-1]])):
        start, end = int(starts[first]), int(ends[first])
        characters = [index for index in range(start, end) for _ in text[index].encode()]
        run = slice(first, first + len(characters))
        if len(starts[run]) == len(characters) and np.all((starts[run] == start) & (ends[run] == end)):
            starts[run] = characters
            ends[run] = starts[run] + 1


def is_unicode(text: str) -> bool:
    """False for text with half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
