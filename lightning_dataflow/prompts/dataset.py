"""The tokenised prompts of a run, and counts of the records that were left out."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from lightning_dataflow.contracts import PromptTask, UserError
from lightning_dataflow.prompts.conversation import FORMATS, normalise
from lightning_dataflow.prompts.masking import Encoder, Unusable
from lightning_dataflow.prompts.sources import read_records

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MIN_LABEL_POSITION = 2
"""A draft sees token t+1 and predicts token t+2, so the first two tokens of a sample are never labels."""


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """Token ids and loss mask of one sample, lists of S ints; `source_id` names its record."""

    source_id: str
    input_ids: Sequence[int]
    loss_mask: Sequence[int]

    @property
    def question(self) -> Sequence[int]:
        """The tokens before the first supervised one; if everything is supervised, the first half."""
        first = next(index for index, flag in enumerate(self.loss_mask) if flag)
        return self.input_ids[: first or max(1, len(self.input_ids) // 2)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptDataset(Sequence[TokenizedPrompt]):
    """Prompts that have something to learn, in file order.

    Attributes:
        max_length: samples were cut to this many tokens.
        skipped: number of records left out, by reason.
    """

    prompts: Sequence[TokenizedPrompt]
    max_length: int
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]

    @cached_property
    def version(self) -> str:
        """Fingerprint of every prompt, its mask and their order, 16 hex digits."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(repr((prompt.source_id, prompt.input_ids, prompt.loss_mask)).encode())
        return digest.hexdigest()[:16]

    def check_target(self, vocab_size: int, max_positions: int) -> None:
        """Raise UserError for a token id outside the target's vocabulary, or a prompt longer than its positions."""
        for prompt in self.prompts:
            wrong = next((token for token in prompt.input_ids if not 0 <= token < vocab_size), None)
            if wrong is not None:
                raise UserError(
                    f"record {prompt.source_id} has token id {wrong}, the target's vocabulary has {vocab_size}: "
                    "use the target's own tokenizer"
                )
            if len(prompt.input_ids) > max_positions:
                raise UserError(
                    f"record {prompt.source_id} has {len(prompt.input_ids)} tokens, the target reads {max_positions}: "
                    f"set data.max_length to at most {max_positions}"
                )

    def token_counts(self, vocab_size: int) -> "torch.Tensor":
        """How often each token id is supervised, int64 [vocab_size]; all ids are below `vocab_size`."""
        import torch

        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for prompt in self.prompts:
            ids = torch.tensor(prompt.input_ids)[torch.tensor(prompt.loss_mask, dtype=torch.bool)]
            counts += torch.bincount(ids, minlength=vocab_size)
        return counts

    def task(self, index: int, pass_index: int, *, run_id: str, target_model_version: str, attempt: int = 0) -> PromptTask:
        """The task of prompt `index` in pass `pass_index`."""
        prompt = self.prompts[index]
        return PromptTask(
            task_id=f"{prompt.source_id}-p{pass_index}",
            run_id=run_id,
            source_id=prompt.source_id,
            payload={"input_ids": prompt.input_ids, "loss_mask": prompt.loss_mask},
            max_length=self.max_length,
            target_model_version=target_model_version,
            attempt=attempt,
            metadata={"pass": pass_index},
        )


def load_prompts(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    format: str = "auto",
    split: str = "train",
    num_eval_samples: int = 0,
    num_samples: int | None = None,
    chat_template: str | None = None,
) -> tuple[PromptDataset, PromptDataset]:
    """Read, tokenise and filter prompts. Returns (training prompts, held-out prompts).

    The first `num_eval_samples` usable records are held out, the next `num_samples` (None: all) are trained on.

    Raises:
        UserError: missing or broken file, unknown format, no chat template, nothing left after filtering.
    """
    if format not in FORMATS:
        raise UserError(f"data.format={format} is unknown: use one of {', '.join(FORMATS)}")
    if max_length <= MIN_LABEL_POSITION:
        raise UserError(f"data.max_length={max_length} leaves nothing to learn: use at least {MIN_LABEL_POSITION + 1}")
    encoder = Encoder(tokenizer, chat_template)
    skipped: Counter[str] = Counter()
    wanted = None if num_samples is None else num_eval_samples + num_samples
    usable = list(islice(_usable(path, split, format, encoder, max_length, skipped), wanted))
    held_out, training = usable[:num_eval_samples], usable[num_eval_samples:]
    if not training:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common()) or "the file is empty"
        raise UserError(
            f"no prompts left to train on in {path} ({len(held_out)} held out; left out: {reasons}): "
            "check data.path, data.format and data.max_length"
        )
    return (
        PromptDataset(prompts=training, max_length=max_length, skipped=dict(skipped)),
        PromptDataset(prompts=held_out, max_length=max_length),
    )


def _usable(
    path: str, split: str, format: str, encoder: Encoder, max_length: int, skipped: Counter[str]
) -> Iterator[TokenizedPrompt]:
    for number, record in read_records(path, split=split):
        try:
            ids, mask = encoder.encode(normalise(record, format, f"{path}, record {number}"))
        except Unusable as reason:
            skipped[str(reason)] += 1
            continue
        if not any(mask):
            skipped["nothing supervised"] += 1
        elif not any(mask[MIN_LABEL_POSITION:max_length]):
            skipped["nothing supervised within max_length"] += 1
        else:
            yield TokenizedPrompt(
                source_id=f"{number:08d}", input_ids=tuple(ids[:max_length]), loss_mask=tuple(mask[:max_length])
            )
