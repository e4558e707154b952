"""The control plane of target and trainer in one process: nothing to coordinate, nothing to remember."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from typing_extensions import override

from lightning_dataflow.control.leases import CommitEntry, Lease, NoLease, RunPlan, Watermarks
from lightning_dataflow.control.ledger import MetadataStore
from lightning_dataflow.control.log import StreamingRefChannel


class NoOpMetadataStore(MetadataStore):
    """Retains nothing: every commit is accepted, nothing is leased, all counts are zero."""

    @override
    def fence(self) -> dict[int, int]:
        return {}

    @override
    def begin(
        self, plan: RunPlan, *, published: Mapping[int, tuple[str, int]], wanted: Mapping[int, int], frontier: int
    ) -> None:
        pass

    @override
    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | NoLease:
        return NoLease("not begun")

    @override
    def renew(self, worker: str, lease_s: float) -> None:
        pass

    @override
    def give_back(
        self,
        lease: Lease,
        skips: Mapping[int, bytes],
        log: StreamingRefChannel,
        *,
        counts: bool = True,
    ) -> list[int]:
        return []

    @override
    def commit(self, lease: Lease, captured: Mapping[int, CommitEntry], log: StreamingRefChannel) -> list[int]:
        return list(captured)

    @override
    def want(self, seq: int, generation: str) -> bool:
        return False

    @override
    def free(self, seqs: Iterable[int]) -> None:
        pass

    @override
    def ack(self, next_seq: int, global_step: int, freed: Iterable[int] = ()) -> None:
        pass

    @override
    def ack_durable(self, next_seq: int, global_step: int) -> None:
        pass

    @override
    def count_wait(self) -> None:
        pass

    @override
    def finish(self, status: str) -> None:
        pass

    @override
    def now(self) -> float:
        return time.time()

    @override
    def report(self, name: str, state: str, *, failed: bool = False, fatal: bool = False) -> None:
        pass

    @override
    def claim(self, name: str, state: str, before: tuple[str, int] | None) -> bool:
        return True

    @override
    def in_flight(self) -> tuple[int, int]:
        return 0, 0

    @override
    def _run_values(self) -> Mapping[str, Any]:
        return {}

    @override
    def _sample_states(self) -> Mapping[int, tuple[str, int]]:
        return {}

    @override
    def _part_texts(self) -> Mapping[str, str]:
        return {}
