"""What a trainer asks of producers, and what the ledger gives to one of them at a time."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_dataflow.contracts import UserError

MAX_ATTEMPTS = 3
"""A sample whose capture failed this often is given up."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a trainer needs: seqs [start, stop), in windows of `window` seqs per optimizer step."""

    start: int
    stop: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Watermarks:
    """Bounds on what is in flight: reserved by a lease or published, and not freed yet.

    Capture pauses when a further group would exceed `high_bytes` or `high_refs`, and goes on at the low marks. The window
    that the trainer waits for is captured above the low marks too, so nothing waits for itself.

    Raises:
        UserError: a low mark is not below its high mark.
    """

    high_bytes: int
    high_refs: int
    low_bytes: int
    low_refs: int

    def __post_init__(self) -> None:
        for unit in ("bytes", "refs"):
            low, high = getattr(self, f"low_{unit}"), getattr(self, f"high_{unit}")
            if not 0 <= low < high:
                raise UserError(f"the low watermark of {low} {unit} is not below the high one of {high}: lower it")

    def check_window(self, num_refs: int, num_bytes: int) -> None:
        """Raise UserError when a window does not fit below the high marks: training could never start it."""
        for unit, size, high in (("refs", num_refs, self.high_refs), ("bytes", num_bytes, self.high_bytes)):
            if size > high:
                raise UserError(
                    f"a window can have {size} {unit}, the high watermark is {high} {unit}: raise "
                    f"topology.high_{unit} (and store.capacity_bytes), or lower data.global_batch_size or data.max_length"
                )


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A worker's right to capture one group of prompts until it expires.

    Attributes:
        seqs: the whole group: it is captured as one batch, the same in every attempt.
        wanted: those of them whose features are to be published.
        attempt: of this capture; higher than that of every earlier one of these samples.
        tries: how often one of them failed already, or had its lease expire. From MAX_ATTEMPTS on it must be given up:
            `ControlPlane.lease` does.
        plan: of the run.
    """

    worker: str
    seqs: tuple[int, ...]
    wanted: tuple[int, ...]
    attempt: int
    plan: RunPlan
    tries: int = 0


class NoLease(NamedTuple):
    """Why `lease` gave nothing.

    Attributes:
        reason: `not begun`: no trainer has said what it needs. `paused`: the watermarks allow no further group now.
            `nothing left`: everything is leased or published.
        plan: of the run, once it has begun.
        finished_at: when the run was finished, on the ledger's clock.
    """

    reason: Literal["not begun", "finished", "paused", "nothing left"]
    plan: RunPlan | None = None
    finished_at: float = 0.0


class Sample(NamedTuple):
    """A sample in flight.

    Attributes:
        tries: failures in this run; attempts also count those of earlier ones.
        bytes: reserved, or published.
        worker, expires: of a lease. What is wanted has expired: it can be leased at any time.
        generation: of what is published.
    """

    state: Literal["leased", "wanted", "published"]
    attempt: int
    bytes: int = 0
    tries: int = 0
    worker: str | None = None
    expires: float = 0.0
    generation: str | None = None


class CommitEntry(NamedTuple):
    """What the ledger and the log are told of a captured sample.

    Attributes:
        generation: of its features; "" where they hold NaN or infinity, so that the sample is given up.
        num_bytes: payload of its features.
        line: its record, encoded by the log.
    """

    generation: str
    num_bytes: int
    line: bytes
