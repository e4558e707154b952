"""References through the control plane between two processes: lease, commit, publish → poll, validate, window, ack, free.

`python -m benchmarks.control` runs a producer and a trainer as processes of their own over a ledger in SQLite and a log in
files, with no features behind the references: what is measured is the control plane alone. References are EAGLE3's (four
features, bfloat16). It prints the rate and, for every tenth of the run, the cost of a reference, the memory of both
processes and the size of the files, which show whether anything grows. It never asserts a time.
"""

import argparse
import multiprocessing
import secrets
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import CaptureSpec, FeatureSpec, SampleOrigin, SampleRef
from lightning_dataflow.control import RunPlan, Watermarks, reconcile_on_restart, resolve_control_plane
from lightning_dataflow.data import StreamingRefQueue
from lightning_dataflow.producers.rollout import IDLE_S
from lightning_dataflow.stores import MemoryFeatureStore

HIDDEN = 2048
CAPTURE = CaptureSpec(layer_ids=(1, 13, 24), norm="post", hidden_size=HIDDEN)
MARKS = Watermarks(high_bytes=1 << 50, low_bytes=1 << 49, high_refs=4096, low_refs=3072)
SEGMENT_BYTES = 8 << 20


@lru_cache
def features(num_tokens: int) -> dict[str, FeatureSpec]:
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "input_ids": ((num_tokens,), "int64"),
        "loss_mask": ((num_tokens,), "uint8"),
        "aux_hidden_states": ((num_tokens, 3 * HIDDEN), "bfloat16"),
        "last_hidden_state": ((num_tokens, HIDDEN), "bfloat16"),
    }
    return {
        name: FeatureSpec(
            name=name, shape=shape, dtype=dtype, target_repr="hidden_state" if name == "last_hidden_state" else None
        )
        for name, (shape, dtype) in shapes.items()
    }


def num_tokens(seq: int) -> int:
    return 128 + seq * 37 % 1920


def num_bytes(seq: int) -> int:
    return num_tokens(seq) * (2 * 4 * HIDDEN + 8 + 1)


def reference(seq: int, attempt: int) -> SampleRef:
    task = f"{seq:08d}-p0"
    origin = SampleOrigin(
        sample_id=f"bench:{task}",
        run_id="bench",
        source_task_id=task,
        source_id=f"{seq:08d}",
        capture=CAPTURE,
        target_model_version="0123456789abcdef",
        tokenizer_version="fedcba9876543210",
        num_tokens=num_tokens(seq),
        attempt=attempt,
        metadata={"pass": 0},
    )
    return SampleRef(
        origin=origin,
        uri="mooncake://bench",
        generation=f"{attempt}-{secrets.token_hex(8)}",
        features=features(origin.num_tokens),
        num_bytes=num_bytes(seq),
    )


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def produce(folder: Path, group: int, seen: Any) -> None:
    """`seen` holds this process's memory in MB and its CPU seconds."""
    plane = resolve_control_plane("disaggregated", "bench", path=folder)
    plane.log.announce({"run_id": "bench"})
    seen[1] = time.process_time()
    while plane.ledger.finished() is None:
        lease = plane.ledger.lease("producer", group=group, num_bytes=num_bytes, watermarks=MARKS, lease_s=60.0)
        if lease is None:
            seen[0] = resident_mb()
            time.sleep(IDLE_S[0])
            continue
        plane.publish(lease, {seq: reference(seq, lease.attempt) for seq in lease.wanted})
        seen[1] = time.process_time()


def train(folder: Path, num_refs: int, window: int, producer: Any) -> list[dict[str, float]]:
    """One row for every tenth of the run."""
    plane = resolve_control_plane("disaggregated", "bench", path=folder)
    plane.log.wait_for_card(60.0, "the producer")
    queue = StreamingRefQueue(plane)
    reconcile_on_restart(plane, MemoryFeatureStore(), RunPlan(start=0, stop=num_refs, window=window), queue.catch_up)
    rows, block = [], num_refs // 10 // window * window
    start = block_start = time.perf_counter()
    cpu = time.process_time(), producer[1]
    for seq in range(0, num_refs // window * window, window):
        seqs = range(seq, seq + window)
        found = queue.get(seqs, seqs)
        assert len(found.entries) == window
        queue.ack(seqs.stop)
        plane.ledger.ack(seqs.stop, seqs.stop // window, seqs)
        if seqs.stop % block == 0:
            plane.ledger.ack_durable(seqs.stop, seqs.stop // window)
            plane.log.trim(seqs.stop)
            now, now_cpu = time.perf_counter(), (time.process_time(), producer[1])
            rows.append(
                {
                    "refs": seqs.stop,
                    "us": 1e6 * (now - block_start) / block,
                    "trainer_us": 1e6 * (now_cpu[0] - cpu[0]) / block,
                    "producer_us": 1e6 * (now_cpu[1] - cpu[1]) / block,
                    "trainer_mb": resident_mb(),
                    "producer_mb": producer[0],
                    "log_mb": sum(path.stat().st_size for path in folder.glob("log-*")) / 1e6,
                    "ledger_mb": sum(path.stat().st_size for path in folder.glob("ledger*")) / 1e6,
                }
            )
            block_start, cpu = now, now_cpu
    rows.append({"refs_per_s": num_refs // window * window / (time.perf_counter() - start)})
    plane.ledger.finish("completed")
    return rows


def measure(num_refs: int, group: int, window: int) -> None:
    context = multiprocessing.get_context("spawn")
    seen = context.Array("d", 2)
    with tempfile.TemporaryDirectory() as folder:
        producer = context.Process(target=produce, args=(Path(folder), group, seen))
        producer.start()
        *rows, total = train(Path(folder), num_refs, window, seen)
        producer.join(60)
    print(f"\n{num_refs} refs, groups of {group}, windows of {window}: {total['refs_per_s']:,.0f} refs/s")
    print("| refs so far | µs a ref | CPU of trainer, producer, µs | memory of both, MB | log, MB | ledger, MB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['refs']:,} | {row['us']:.1f} | {row['trainer_us']:.1f}, {row['producer_us']:.1f} | "
            f"{row['trainer_mb']:.0f}, {row['producer_mb']:.0f} | {row['log_mb']:.1f} | {row['ledger_mb']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refs", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=64)
    options = parser.parse_args()
    for group in (32, 1):
        measure(options.refs, group, options.window)


if __name__ == "__main__":
    main()
