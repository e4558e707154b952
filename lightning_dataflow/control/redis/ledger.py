"""MetadataStore `redis`: for the processes of any number of machines."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from lightning_dataflow.control.fields import read_count, read_number, read_plan, read_sample
from lightning_dataflow.control.leases import MAX_ATTEMPTS, CommitEntry, Lease, NoLease, RunPlan, Sample, Watermarks
from lightning_dataflow.control.ledger import SILENT_S, MetadataStore
from lightning_dataflow.control.log import StreamingRefChannel
from lightning_dataflow.control.processes import this_process
from lightning_dataflow.control.redis.scripts import ALWAYS, GROWING
from lightning_dataflow.control.redis.server import RedisServer


class RedisMetadataStore(MetadataStore):
    """The ledger in Redis: every call is one script, which nobody else gets in between of, and the clock is the server's.

    Rows exist only for samples in flight. What frees something works while memory is full; leases and commits do not.

    Args:
        server: the log of the run must be a RedisChannel on the same.
    """

    def __init__(self, server: RedisServer):
        self.server = server
        self._expected = range(0)  # the group that is leased next, if no other process takes it

    @property
    def term(self) -> str:
        """It guards the log, too."""
        return self.server.term

    @term.setter
    def term(self, value: str) -> None:
        self.server.term = value

    def fence(self) -> dict[int, int]:
        return {int(seq): attempt for seq, attempt in self._change("fence")}

    def begin(self, plan: RunPlan, samples: Mapping[int, Sample], frontier: int) -> None:
        rows = [(seq, sample._asdict()) for seq, sample in samples.items()]
        self._change("begin", json.dumps(asdict(plan)), plan.start, plan.start // plan.window, frontier, SILENT_S, rows)

    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | NoLease:
        while True:
            expected = self._expected  # another thread may lease too
            sizes = [num_bytes(seq) for seq in expected]
            offer = (worker, group, lease_s, asdict(watermarks), expected.start, sizes)
            answer = self.server.change(GROWING, "lease", *offer)
            plan = read_plan(answer["plan"]) if "plan" in answer else None
            if "reason" in answer:
                return NoLease(answer["reason"], plan, read_number(answer, "finished_at"))
            assert plan is not None, "something is leased only of a run that has begun"
            self._expected = range(answer["first"], answer["stop"])
            if "wanted" in answer:
                seqs, self._expected = tuple(self._expected), range(answer["stop"], min(answer["stop"] + group, plan.stop))
                found = {name: answer[name] for name in ("attempt", "tries")}
                return Lease(worker=worker, seqs=seqs, wanted=tuple(answer["wanted"]), plan=plan, **found)

    def renew(self, worker: str, lease_s: float) -> None:
        self._change("renew", worker, lease_s)

    def give_back(self, lease: Lease, skips: Mapping[int, bytes], log: StreamingRefChannel, counts: bool) -> list[int]:
        lines = [(seq, line.decode()) for seq, line in skips.items()]
        return list(self._change("give_back", lease.worker, lease.attempt, int(counts), MAX_ATTEMPTS, lines))

    def commit(self, lease: Lease, captured: Mapping[int, CommitEntry], log: StreamingRefChannel) -> list[int]:
        entries = [(seq, entry.generation, entry.num_bytes, entry.line.decode()) for seq, entry in captured.items()]
        return list(self.server.change(GROWING, "commit", lease.worker, lease.attempt, entries))

    def want(self, seq: int, generation: str) -> bool:
        return bool(self._change("want", seq, generation, MAX_ATTEMPTS))

    def count_wait(self) -> None:
        self._change("count_wait")

    def finish(self, status: str) -> None:
        self._change("finish", status)

    def now(self) -> float:
        seconds, micros = self.server.ask("TIME")
        return int(seconds) + int(micros) / 1e6

    def report(self, name: str, state: str, *, failed: bool = False, fatal: bool = False) -> None:
        self._change("report", name, this_process(state, failed=failed, fatal=fatal))

    def claim(self, name: str, state: str, before: tuple[str, int] | None) -> bool:
        self.term = ""
        term = self._change("claim", name, this_process(state), *(before or ("", 0)))
        if term is False:
            return False
        self.term = term
        return True

    def in_flight(self) -> tuple[int, int]:
        name = "bytes_in_flight"
        num_bytes = self.server.read("HGET", self.server.key("totals"), name)
        return self.server.ask("HLEN", self.server.key("samples")), read_count({name: num_bytes or 0}, name)

    def close(self) -> None:
        """The last process that leaves a completed run removes what it kept in Redis."""
        self.server.leave()

    def _update(self, totals: Mapping[str, int], freed: Iterable[int]) -> None:
        self._change("update", totals, list(freed))

    def _run_values(self) -> Mapping[str, Any]:
        return self._hash("totals")

    def _sample_states(self) -> Mapping[int, tuple[str, int]]:
        rows = {seq: read_sample(seq, text) for seq, text in self._hash("samples").items()}
        return {int(seq): row for seq, row in rows.items()}

    def _part_texts(self) -> Mapping[str, str]:
        return self._hash("parts")

    def _change(self, operation: str, *arguments: Any) -> Any:
        return self.server.change(ALWAYS, operation, *arguments)

    def _hash(self, name: str) -> dict[str, str]:
        flat = [text.decode(errors="replace") for text in self.server.read("HGETALL", self.server.key(name))]
        return dict(zip(flat[::2], flat[1::2], strict=True))
