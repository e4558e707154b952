"""The control plane of target and trainer in one process: nothing to coordinate, nothing to remember."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning_dataflow.control.ledger import CommitEntry, Lease, MetadataStore, NoLease, RunPlan, Watermarks
from lightning_dataflow.control.log import StreamingRefChannel


class NoOpMetadataStore(MetadataStore):
    """Retains nothing: every commit is accepted, nothing is leased, all counts are zero."""

    def fence(self) -> dict[int, int]:
        """See MetadataStore."""
        return {}

    def begin(
        self, plan: RunPlan, *, published: Mapping[int, tuple[str, int]], wanted: Mapping[int, int], frontier: int
    ) -> None:
        """See MetadataStore."""

    def plan(self) -> RunPlan | None:
        """See MetadataStore."""
        return None

    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | NoLease:
        """See MetadataStore."""
        return NoLease("not begun")

    def renew(self, worker: str, lease_s: float) -> None:
        """See MetadataStore."""

    def give_back(
        self,
        lease: Lease,
        skips: Mapping[int, bytes],
        log: StreamingRefChannel,
        *,
        retryable: bool = True,
        counts: bool = True,
    ) -> list[int]:
        """See MetadataStore."""
        return []

    def commit(self, lease: Lease, captured: Mapping[int, CommitEntry], log: StreamingRefChannel) -> list[int]:
        """See MetadataStore."""
        return list(captured)

    def want(self, seq: int, generation: str) -> bool:
        """See MetadataStore. There is nobody to capture it again."""
        return False

    def free(self, seqs: Iterable[int]) -> None:
        """See MetadataStore."""

    def ack(self, next_seq: int, global_step: int, freed: Iterable[int] = ()) -> None:
        """See MetadataStore."""

    def ack_durable(self, next_seq: int, global_step: int) -> None:
        """See MetadataStore."""

    def count_wait(self) -> None:
        """See MetadataStore."""

    def finish(self, status: str) -> None:
        """See MetadataStore."""

    def finished(self, since: float = 0.0) -> str | None:
        """See MetadataStore."""
        return None

    def now(self) -> float:
        """See MetadataStore."""
        return time.time()

    def report(self, name: str, state: str, *, failed: bool = False, fatal: bool = False) -> None:
        """See MetadataStore."""

    def claim(self, name: str, state: str, before: tuple[str, int] | None) -> bool:
        """See MetadataStore. Nobody else is there."""
        return True

    def join(self) -> None:
        """See MetadataStore."""

    def is_ours(self) -> bool:
        """See MetadataStore."""
        return True

    def failures(self) -> Sequence[str]:
        """See MetadataStore."""
        return []

    def in_flight(self) -> tuple[int, int]:
        """See MetadataStore."""
        return 0, 0

    def status(self) -> dict[str, Any]:
        """See MetadataStore."""
        return {"refs_in_flight": 0, "bytes_in_flight": 0}
