"""References through the control plane between processes: lease, commit, publish → poll, validate, window, ack, free.

`python -m benchmarks.control` runs producers and the ranks of a trainer as processes of their own over a ledger in SQLite
and a log in files, or with `--control redis` over a Redis, with no features behind the references: what is measured is the
control plane alone. Ranks wait for each other at every window, as for a step's collectives. References are EAGLE3's (four
features, bfloat16). It prints the rate and, for every tenth of the run, the cost of a reference, the memory of a
process and the size of the files, which show whether anything grows. It never asserts a time.
"""

import argparse
import gc
import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.references import num_bytes, reference
from lightning_dataflow.control import (
    ControlPlane,
    NoLease,
    RunPlan,
    Watermarks,
    reconcile_on_restart,
    resolve_control_plane,
)
from lightning_dataflow.control.redis.address import RedisAddress
from lightning_dataflow.control.redis.server import KEYS, RedisServer
from lightning_dataflow.data import StreamingRefQueue
from lightning_dataflow.producers.rollout import IDLE_S
from lightning_dataflow.services.redis import LocalRedis
from lightning_dataflow.stores import MemoryFeatureStore

WINDOWS_IN_FLIGHT, REFS_IN_FLIGHT = 8, 4096


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@dataclass(frozen=True)
class Place:
    """Where log and ledger are: a folder, or a Redis."""

    folder: Path
    redis: RedisAddress | None

    def open(self) -> ControlPlane:
        return resolve_control_plane("disaggregated", "bench", path=self.folder, redis=self.redis)

    def sizes(self) -> dict[str, float]:
        """MB of log and ledger, and the server's CPU seconds."""
        if self.redis is None:
            log, ledger = (sum(path.stat().st_size for path in self.folder.glob(name)) for name in ("log-*", "ledger*"))
            return {"log_mb": log / 1e6, "ledger_mb": ledger / 1e6, "server_s": 0.0}
        server = RedisServer(self.redis, "bench")
        keys = [(name, server.ask("MEMORY", "USAGE", server.key(name)) or 0) for name in KEYS]
        cpu = dict(line.split(":") for line in server.ask("INFO", "CPU").decode().split() if ":" in line)
        return {
            "log_mb": sum(size for name, size in keys if name == "log") / 1e6,
            "ledger_mb": sum(size for name, size in keys if name != "log") / 1e6,
            "server_s": float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"]),
        }


class Meeting:
    """Where ranks wait for each other, as in a step's collectives; cheaper than multiprocessing's barrier."""

    def __init__(self, context: Any, num_ranks: int):
        self._here = context.Semaphore(0)
        self._go = [context.Semaphore(0) for _ in range(num_ranks)]

    def wait(self, rank: int) -> None:
        """Until all ranks are here."""
        if rank > 0:
            self._here.release()
            self._go[rank].acquire()
            return
        for _ in self._go[1:]:
            self._here.acquire()
        for go in self._go[1:]:
            go.release()


def marks(window: int) -> Watermarks:
    """Bounds of the references in flight."""
    high = max(WINDOWS_IN_FLIGHT * window, REFS_IN_FLIGHT)
    return Watermarks(high_bytes=1 << 50, low_bytes=1 << 49, high_refs=high, low_refs=high * 3 // 4)


def produce(place: Place, name: str, group: int, watermarks: Watermarks, seen: Any) -> None:
    """`seen` holds this process's memory in MB and its CPU seconds."""
    plane = place.open()
    plane.log.announce({"run_id": "bench"})
    seen[1] = time.process_time()
    while True:
        lease = plane.ledger.lease(name, group=group, num_bytes=num_bytes, watermarks=watermarks, lease_s=60.0)
        if isinstance(lease, NoLease):
            if lease.reason == "finished":
                return
            seen[0] = resident_mb()
            time.sleep(IDLE_S[0])
            continue
        plane.publish(lease, {seq: reference(seq, lease.attempt) for seq in lease.wanted})
        seen[1] = time.process_time()


def read(place: Place, rank: int, options: argparse.Namespace, meeting: Meeting, cpu: Any, begun: Any) -> None:
    """A rank: every window, and of it the refs of its share, which it frees."""
    plane = place.open()
    plane.log.wait_for_card(60.0, "the producer")
    queue = StreamingRefQueue(plane)
    if rank == 0:
        plan = RunPlan(start=0, stop=options.refs, window=options.window)
        reconcile_on_restart(plane, MemoryFeatureStore(), plan, queue.catch_up)
        begun.set()
    begun.wait()
    share = options.window // options.readers
    cpu[rank] = time.process_time()
    for seq in range(0, options.refs // options.window * options.window, options.window):
        mine = range(seq + rank * share, seq + (rank + 1) * share)
        found = queue.get(range(seq, seq + options.window), mine)
        assert len(found.refs) == share
        meeting.wait(rank)
        queue.ack(seq + options.window)
        if rank == 0:
            plane.ledger.ack(seq + options.window, seq // options.window + 1, mine)
        else:
            plane.ledger.free(mine)
        block = options.refs // 10 // options.window * options.window
        if rank == 0 and (seq + options.window) % block == 0:
            plane.ledger.ack_durable(seq + options.window, seq // options.window + 1)
            plane.log.trim(seq + options.window)
            options.reports.put((seq + options.window, time.perf_counter(), place.sizes(), resident_mb()))
        cpu[rank] = time.process_time()
    meeting.wait(rank)
    if rank == 0:
        plane.ledger.finish("completed")
    plane.close()


def measure(place: Place, options: argparse.Namespace, group: int) -> None:
    gc.freeze()  # what is imported is walked by no process
    context = multiprocessing.get_context("fork")  # starts at once
    seen = [context.Array("d", 2) for _ in range(options.producers)]
    cpu, begun, options.reports = context.Array("d", options.readers), context.Event(), context.Queue()
    meeting = Meeting(context, options.readers)
    watermarks = marks(options.window)
    processes = [
        *(
            context.Process(target=produce, args=(place, f"producer-{index}", group, watermarks, one))
            for index, one in enumerate(seen)
        ),
        *(
            context.Process(target=read, args=(place, rank, options, meeting, cpu, begun))
            for rank in range(options.readers)
        ),
    ]
    for process in processes:
        process.start()
    begun.wait()
    last = first = time.perf_counter()
    done, rows = 0, []
    cpus = [sum(cpu), sum(one[1] for one in seen), place.sizes()["server_s"]]
    while done < options.refs // 10 // options.window * options.window * 10:
        refs, now, sizes, trainer_mb = options.reports.get(timeout=600)
        all_cpu = [sum(cpu), sum(one[1] for one in seen), sizes["server_s"]]
        micros = [1e6 * (new - old) / (refs - done) for new, old in zip(all_cpu, cpus, strict=True)]
        rows.append((refs, 1e6 * (now - last) / (refs - done), *micros, trainer_mb, seen[0][0], sizes))
        cpus, last, done = all_cpu, now, refs
    print(
        f"\n{'Redis' if place.redis else 'SQLite and files'}, {options.refs} refs, groups of {group}, windows of "
        f"{options.window}, {options.producers} producers, {options.readers} readers: {done / (last - first):,.0f} refs/s"
    )
    print("| refs so far | µs a ref | CPU of readers, producers, server, µs | reader, producer, MB | log, ledger, MB |")
    print("|---|---|---|---|---|")
    for refs, micros, readers, producers, server, reader_mb, producer_mb, sizes in rows:
        cpus, memory = f"{readers:.1f}, {producers:.1f}, {server:.1f}", f"{reader_mb:.0f}, {producer_mb:.0f}"
        print(f"| {refs:,} | {micros:.1f} | {cpus} | {memory} | {sizes['log_mb']:.1f}, {sizes['ledger_mb']:.2f} |")
    for process in processes:
        process.join(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--control", choices=("sqlite", "redis"), default="sqlite")
    parser.add_argument("--refs", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--producers", type=int, default=1)
    parser.add_argument("--groups", type=int, nargs="+", default=(32, 1))
    options = parser.parse_args()
    for group in options.groups:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            server = stack.enter_context(LocalRedis(folder)) if options.control == "redis" else None
            measure(Place(Path(folder), server.where if server else None), options, group)


if __name__ == "__main__":
    main()
