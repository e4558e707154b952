"""The control plane of target and trainer in one process: nothing to coordinate, nothing to remember."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_dataflow.control.leases import CommitEntry, Lease, NoLease, RunPlan, Sample, Watermarks
from lightning_dataflow.control.ledger import MetadataStore
from lightning_dataflow.control.log import StreamingRefChannel


class NoOpMetadataStore(MetadataStore):
    """Retains nothing: every commit is accepted, nothing is leased, all counts are zero."""

    def fence(self) -> dict[int, int]:
        return {}

    def begin(self, plan: RunPlan, samples: Mapping[int, Sample], frontier: int) -> None:
        pass

    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | NoLease:
        return NoLease("not begun")

    def renew(self, worker: str, lease_s: float) -> None:
        pass

    def give_back(self, lease: Lease, skips: Mapping[int, bytes], log: StreamingRefChannel, counts: bool) -> list[int]:
        return []

    def commit(self, lease: Lease, captured: Mapping[int, CommitEntry], log: StreamingRefChannel) -> list[int]:
        return list(captured)

    def want(self, seq: int, generation: str) -> bool:
        return False

    def count_wait(self) -> None:
        pass

    def finish(self, status: str) -> None:
        pass

    def now(self) -> float:
        return time.time()

    def report(self, name: str, state: str, *, failed: bool = False, fatal: bool = False) -> None:
        pass

    def claim(self, name: str, state: str, before: tuple[str, int] | None) -> bool:
        return True

    def in_flight(self) -> tuple[int, int]:
        return 0, 0

    def _update(self, totals: Mapping[str, int], freed: Iterable[int]) -> None:
        pass

    def _run_values(self) -> Mapping[str, Any]:
        return {}

    def _sample_states(self) -> Mapping[int, tuple[str, int]]:
        return {}

    def _part_texts(self) -> Mapping[str, str]:
        return {}
