"""The tokenised prompts of a run, in arrays that may lie in files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_dataflow.contracts import PromptTask, UserError

if TYPE_CHECKING:
    import torch

NO_TURN = -1
SAMPLE = np.dtype([("end", "<i8"), ("record", "<i4"), ("turn", "<i4")])
"""What is kept of a sample besides its tokens: where they end, the number of its record, and of its turn or NO_TURN."""
COUNTED_AT_A_TIME = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """Token ids and loss mask of one sample, lists of S ints.

    Attributes:
        source_id: names its record, and its turn where the turns of a conversation are samples of their own.
    """

    source_id: str
    input_ids: Sequence[int]
    loss_mask: Sequence[int]

    @property
    def question(self) -> Sequence[int]:
        """The tokens before the first supervised one; if everything is supervised, the first half."""
        first = next(index for index, flag in enumerate(self.loss_mask) if flag)
        return self.input_ids[: first or max(1, len(self.input_ids) // 2)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptArrays:
    """Samples one after another: token ids int32 [T], loss mask uint8 [T], and SAMPLE [N]."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    samples: npt.NDArray[np.void]

    def part(self, first: int, last: int) -> "PromptArrays":
        """Samples [first, last), without a copy of their tokens."""
        samples = self.samples[first:last].copy()
        start = int(self.samples["end"][first - 1]) if first else 0
        end = int(samples["end"][-1]) if len(samples) else start
        samples["end"] -= start
        return PromptArrays(input_ids=self.input_ids[start:end], loss_mask=self.loss_mask[start:end], samples=samples)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptDataset(Sequence[TokenizedPrompt]):
    """Prompts that have something to learn, in file order.

    Attributes:
        max_length: samples were cut to this many tokens.
        skipped: number of records, turns and samples left out, by reason.
    """

    arrays: PromptArrays
    max_length: int
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrays.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        index %= len(self)
        start, end = (int(bound) for bound in self.bounds[index : index + 2])
        return TokenizedPrompt(
            source_id=self.source_id(index),
            input_ids=tuple(self.arrays.input_ids[start:end].tolist()),
            loss_mask=tuple(self.arrays.loss_mask[start:end].tolist()),
        )

    def source_id(self, index: int) -> str:
        """The name of prompt `index`: its record's number, and its turn's."""
        sample = self.arrays.samples[index]
        return f"{sample['record']:08d}" + ("" if sample["turn"] == NO_TURN else f"-t{sample['turn']}")

    @property
    def source_ids(self) -> list[str]:
        """The names of all prompts."""
        return [self.source_id(index) for index in range(len(self))]

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """Prompt i has the tokens [bounds[i], bounds[i + 1])."""
        return np.concatenate([[0], self.arrays.samples["end"]]).astype(np.int64)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each prompt, int64 [N]."""
        return np.diff(self.bounds)

    @property
    def num_records(self) -> int:
        """Records that the prompts come from."""
        return len(np.unique(self.arrays.samples["record"]))

    @cached_property
    def version(self) -> str:
        """Fingerprint of every prompt, its mask and their order, 16 hex digits."""
        digest = hashlib.sha256()
        for array in (self.arrays.samples, self.arrays.input_ids, self.arrays.loss_mask):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def check_target(self, vocab_size: int, max_positions: int) -> None:
        """Raise UserError for a token id outside the target's vocabulary, or a prompt longer than its positions."""
        if self.arrays.input_ids.max(initial=0) >= vocab_size:
            wrong = int(np.argmax(self.arrays.input_ids >= vocab_size))
            prompt = int(np.searchsorted(self.bounds, wrong, side="right")) - 1
            raise UserError(
                f"record {self.source_id(prompt)} has token id {self.arrays.input_ids[wrong]}, the target's vocabulary "
                f"has {vocab_size}: use the target's own tokenizer"
            )
        if len(long := np.flatnonzero(self.lengths > max_positions)):
            raise UserError(
                f"record {self.source_id(int(long[0]))} has {self.lengths[long[0]]} tokens, the target reads "
                f"{max_positions}: set data.max_length to at most {max_positions}"
            )

    def token_counts(self, vocab_size: int) -> "torch.Tensor":
        """How often each token id is supervised, int64 [vocab_size]; all ids are below `vocab_size`."""
        import torch

        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(self.arrays.input_ids), COUNTED_AT_A_TIME):
            part = slice(start, start + COUNTED_AT_A_TIME)
            counts += np.bincount(self.arrays.input_ids[part][self.arrays.loss_mask[part] != 0], minlength=vocab_size)
        return torch.from_numpy(counts)

    def task(self, index: int, pass_index: int, *, run_id: str, target_model_version: str, attempt: int = 0) -> PromptTask:
        """The task of prompt `index` in pass `pass_index`."""
        prompt = self[index]
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
