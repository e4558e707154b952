"""What a producer announces: plain data that tells a trainer all it must know of the samples before they are captured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.log import MAX_SEQ
from lightning_dataflow.contracts.validation import MAX_SAMPLE_BYTES, MAX_TOKENS, check_count, check_id
from lightning_dataflow.data.source import FeatureCard

MAX_SAMPLES = 1 << 28
"""Of a pass: their order takes 8 bytes each."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """The first thing that a producer writes into the log of a run.

    Attributes:
        num_samples: in one pass.
        seed: of the order of seqs; None if seqs number the samples themselves.
        token_counts: how often each token is supervised in one pass, without those that never are.
        capture_batch_size: prompts that are captured together.
        largest_bytes: payload of the largest sample.
    """

    run_id: str
    card: FeatureCard
    num_samples: int
    seed: int | None
    token_counts: Mapping[int, int]
    capture_batch_size: int
    largest_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain data, whose keys are strings."""
        return asdict(self) | {"token_counts": {str(token): count for token, count in self.token_counts.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> "Announcement":
        """Rebuild what `to_json` made. Raises UserError for anything else."""
        try:
            counts = {int(token): int(count) for token, count in data["token_counts"].items()}
            announced = cls(**{**data, "card": FeatureCard.from_json(data["card"]), "token_counts": counts})
            announced._check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = str(error) if isinstance(error, UserError) else repr(error)[:200]
            raise UserError(f"what {where} announces is damaged ({reason}): start again under another run_name") from error
        return announced

    def _check(self) -> None:
        check_id(self.run_id, "run_id")
        check_count(self.num_samples, 1, MAX_SAMPLES, "num_samples")
        check_count(self.capture_batch_size, 1, MAX_SAMPLES, "capture_batch_size")
        check_count(self.largest_bytes, 0, MAX_SAMPLE_BYTES, "largest_bytes")
        if self.seed is not None:
            check_count(self.seed, 0, 2**32 - 1, "seed")
        for token, count in self.token_counts.items():
            check_count(token, 0, MAX_TOKENS, "a token of token_counts")
            check_count(count, 0, MAX_SEQ, f"token_counts of {token}")
