"""What a producer announces: plain data that tells a trainer all it must know of the samples before they are captured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.data.source import FeatureCard


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
            if announced.num_samples < 1 or min((*counts, *counts.values()), default=0) < 0:
                raise ValueError(f"{announced.num_samples} samples")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"what {where} announces is damaged ({error!r}): start again under another run_name") from error
        return announced
