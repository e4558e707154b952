"""MetadataStore `redis`: for the processes of any number of machines."""

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning_dataflow.control.ledger import (
    MAX_ATTEMPTS,
    SILENT_S,
    TOTALS,
    CommitEntry,
    Lease,
    MetadataStore,
    NoLease,
    RunPlan,
    Watermarks,
)
from lightning_dataflow.control.log import StreamingRefChannel
from lightning_dataflow.control.processes import pid_space
from lightning_dataflow.control.redis.log import RedisChannel, new_nonce
from lightning_dataflow.control.redis.records import split
from lightning_dataflow.control.redis.scripts import ALLOW_OOM, NO_WRITES, Script, change_script, read_script
from lightning_dataflow.control.redis.server import RedisServer

FATAL = 2
"""In a part's `failed`: 0 is alive, 1 failed."""


class RedisMetadataStore(MetadataStore):
    """The ledger in Redis: every call is one script, which nobody else gets in between of, and the clock is the server's.

    Rows exist only for samples in flight. What frees something works while memory is full; leases and commits do not.

    Args:
        server: the log of the run must be a RedisChannel on the same.
    """

    def __init__(self, server: RedisServer):
        self.server = server
        package = __package__
        self._growing = change_script("ledger.lua", package=package)
        self._freeing = change_script("ledger.lua", package=package, flags=ALLOW_OOM)
        self._running = change_script("ledger.lua", "run.lua", package=package, flags=ALLOW_OOM)
        self._status = Script(read_script("status.lua", package), NO_WRITES)
        self._expected = range(0)  # what this process leases next, if nobody else does
        self._totals = server.key("totals")

    def fence(self) -> dict[int, int]:
        """See MetadataStore."""
        found = self._run("fence") or []
        return {int(seq): int(attempt) for seq, attempt in zip(found[::2], found[1::2], strict=True)}

    def begin(
        self, plan: RunPlan, *, published: Mapping[int, tuple[str, int]], wanted: Mapping[int, int], frontier: int
    ) -> None:
        """See MetadataStore."""
        live = [
            (str(seq), int(generation.partition("-")[0]), generation, size) for seq, (generation, size) in published.items()
        ]
        lost = [(str(seq), attempt) for seq, attempt in wanted.items()]
        self._run(
            "begin",
            json.dumps(asdict(plan)),
            plan.start,
            plan.start // plan.window,
            frontier,
            SILENT_S,
            json.dumps(live),
            json.dumps(lost),
        )

    def plan(self) -> RunPlan | None:
        """See MetadataStore."""
        text = self.server.ask("HGET", self._totals, "plan")
        return None if text is None else RunPlan(**json.loads(text))

    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | NoLease:
        """See MetadataStore."""
        marks = (watermarks.high_bytes, watermarks.high_refs, watermarks.low_bytes, watermarks.low_refs)
        while True:
            expected = self._expected  # another thread may lease too
            sizes = [num_bytes(seq) for seq in expected]
            how = (worker, group, lease_s, *marks, expected.start)
            found = self.server.change(self._growing, "lease", *how, listed=sizes)
            plan = RunPlan(**json.loads(found["plan"])) if "plan" in found else None
            if "reason" in found:
                return NoLease(found["reason"], plan, float(found.get("finished_at", 0)))
            assert plan is not None, "something is leased of a run that has begun"
            low, high, stop = int(found["low"]), int(found["high"]), plan.stop
            if "wanted" in found:
                self._expected = range(high, min(high + group, stop))
                seqs = tuple(range(low, high))
                return Lease(
                    worker=worker,
                    seqs=seqs,
                    wanted=seqs if found["wanted"] is True else tuple(map(int, found["wanted"])),
                    attempt=found["attempt"],
                    plan=plan,
                    tries=found["tries"],
                )
            self._expected = range(low, high)

    def renew(self, worker: str, lease_s: float) -> None:
        """See MetadataStore."""
        self.server.change(self._freeing, "renew", worker, lease_s)

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
        self._check_log(log)
        heads, chunks = split([skips[seq] for seq in lease.wanted])
        how = (new_nonce(), _name(lease), lease.attempt, int(retryable), int(counts), MAX_ATTEMPTS, heads)
        given_up = self.server.change(self._freeing, "give_back", *how, listed=[*lease.wanted, *chunks])
        return [int(seq) for seq in given_up]

    def commit(self, lease: Lease, captured: Mapping[int, CommitEntry], log: StreamingRefChannel) -> list[int]:
        """See MetadataStore."""
        self._check_log(log)
        heads, chunks = split([one.line for one in captured.values()])
        samples = [part for seq, one in captured.items() for part in (seq, f"{one.num_bytes} {one.generation}")]
        how = (new_nonce(), _name(lease), lease.attempt, sum([one.num_bytes for one in captured.values()]), heads)
        accepted = self.server.change(self._growing, "commit", *how, listed=[*samples, *chunks])
        return list(captured) if accepted is True else [int(seq) for seq in accepted]

    def want(self, seq: int, generation: str) -> bool:
        """See MetadataStore."""
        return self._run("want", seq, generation, MAX_ATTEMPTS)

    def free(self, seqs: Iterable[int]) -> None:
        """See MetadataStore."""
        self.server.change(self._freeing, "ack", listed=list(seqs))

    def ack(self, next_seq: int, global_step: int, freed: Iterable[int] = ()) -> None:
        """See MetadataStore."""
        totals = ("trained_seq", next_seq, "trained_step", global_step)
        self.server.change(self._freeing, "ack", *totals, listed=list(freed))

    def ack_durable(self, next_seq: int, global_step: int) -> None:
        """See MetadataStore."""
        self.server.change(self._freeing, "ack", "durable_seq", next_seq, "durable_step", global_step)

    def count_wait(self) -> None:
        """See MetadataStore."""
        self._run("count_wait")

    def finish(self, status: str) -> None:
        """See MetadataStore."""
        self._run("finish", status)

    def finished(self, since: float = 0.0) -> str | None:
        """See MetadataStore."""
        status, at = self.server.ask("HMGET", self._totals, "finished", "finished_at")
        return status.decode() if status is not None and float(at) >= since else None

    def now(self) -> float:
        """See MetadataStore."""
        seconds, micros = self.server.ask("TIME")
        return int(seconds) + int(micros) / 1e6

    def report(self, name: str, state: str, *, failed: bool = False, fatal: bool = False) -> None:
        """See MetadataStore."""
        how = FATAL if fatal else int(failed)
        self._run("report", name, socket.gethostname(), os.getpid(), pid_space(), state, how)

    def claim(self, name: str, state: str, before: tuple[str, int] | None) -> bool:
        """See MetadataStore."""
        self.server.term = ""
        term = self._run("claim", name, socket.gethostname(), os.getpid(), pid_space(), state, *(before or ("", 0)))
        if term is False:
            return False
        self.server.term = term
        return True

    def join(self) -> None:
        """See MetadataStore."""
        self.server.term = (self.server.ask("HGET", self._totals, "term") or b"").decode()

    def is_ours(self) -> bool:
        """See MetadataStore."""
        mine = self.server.term
        return not mine or mine == (self.server.ask("HGET", self._totals, "term") or b"").decode()

    def failures(self) -> Sequence[str]:
        """See MetadataStore."""
        found = [part.decode() for part in self.server.ask("HGETALL", self.server.key("failed"))]
        return sorted(f"{name}: {state}" for name, state in zip(found[::2], found[1::2], strict=True))

    def in_flight(self) -> tuple[int, int]:
        """See MetadataStore."""
        commands = [("HLEN", self.server.key("rows")), ("HGET", self._totals, "bytes_in_flight")]
        num_refs, num_bytes = self.server.ask_all(commands)
        return num_refs, int(num_bytes or 0)

    def status(self) -> dict[str, Any]:
        """See MetadataStore."""
        found = json.loads(self.server.ask_script(self._status))
        now, totals, parts = float(found["time"]), _pairs(found["totals"]), _pairs(found["parts"])
        numbers = {name: int(totals.get(name, 0)) for name in TOTALS} | {"refs_in_flight": found["refs"]}
        return {
            "plan": json.loads(totals["plan"]) if "plan" in totals else None,
            "finished": totals.get("finished"),
            **numbers,
            "leased": found["leased"],
            "wanted_again": found["wanted"],
            "waiting_to_be_trained": found["published"] - found["kept"],
            "kept_refs": found["kept"],
            "kept_bytes": int(found["kept_bytes"]),
            "parts": [_part(name, json.loads(text), now) for name, text in sorted(parts.items())],
        }

    def close(self) -> None:
        """See MetadataStore. The last process that leaves a completed run removes what it kept in Redis."""
        self.server.leave()

    def _run(self, operation: str, *arguments: str | int | float) -> Any:
        return self.server.change(self._running, operation, *arguments)

    def _check_log(self, log: StreamingRefChannel) -> None:
        same = (
            isinstance(log, RedisChannel)
            and log.server.where == self.server.where
            and log.server.run_id == self.server.run_id
        )
        assert same, "one script writes both, so both are in one place"


def _name(lease: Lease) -> str:
    """Of a lease in Redis."""
    return f"{lease.seqs[0]} {lease.worker}"


def _pairs(flat: Any) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True)) if flat else {}


def _part(name: str, part: dict[str, Any], now: float) -> dict[str, Any]:
    failed = part.pop("failed")
    return {
        "name": name,
        **part,
        "seen_s_ago": now - float(part.pop("seen")),
        "failed": failed > 0,
        "fatal": failed == FATAL,
    }
