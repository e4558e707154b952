"""A producer that outruns the trainer, over a real Mooncake: `python -m tests.system.soak --samples 20000` prints a report.

The trainer reads windows, holds each for as long as a step would take, and frees it. Meanwhile a third process looks at the
ledger, the memory of both processes and the size of all files.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dataflow.control import ControlPlane, RunPlan, Watermarks, resolve_control_plane
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.stores import MooncakeFeatureStore
from tests.records import rank_slice
from tests.streams import SeqFeed, make_source, make_worker

WINDOW, GROUP = 8, 8
STEP_S = 0.03
SAVE_EVERY = 25
MARKS = Watermarks(high_refs=128, low_refs=64, high_bytes=1 << 20, low_bytes=1 << 19)
SEGMENT_BYTES = 32 << 10


@dataclass(kw_only=True)
class Report:
    """Measurements from outside, over time: memory in kB, files in bytes."""

    trained: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    most_refs: int = 0
    most_bytes: int = 0
    capture_waits: int = 0
    producer_kb: list[int] = field(default_factory=list)
    trainer_kb: list[int] = field(default_factory=list)
    file_bytes: list[int] = field(default_factory=list)
    left_in_store: int = -1


def attach(folder: Path, places: dict[str, Any]) -> tuple[ControlPlane, MooncakeFeatureStore]:
    plane = resolve_control_plane("disaggregated", "run", path=folder)
    plane.log.segment_bytes = SEGMENT_BYTES  # type: ignore[attr-defined]
    return plane, MooncakeFeatureStore("soak", **places)


def produce(folder: Path, places: dict[str, Any]) -> None:
    plane, store = attach(folder, places)
    make_worker(plane, store, SeqFeed(), watermarks=MARKS, group=GROUP, peer_timeout_s=60.0).run()
    store.close()


def train(folder: Path, places: dict[str, Any], num_samples: int, step_s: float, trained: Any) -> None:
    plane, store = attach(folder, places)
    source = make_source(plane, store, start_timeout_s=60.0, idle_timeout_s=30.0)
    source.begin(RunPlan(start=0, stop=num_samples, window=WINDOW), 0, 1)
    for window in range(num_samples // WINDOW):
        seqs = rank_slice(window, WINDOW, 0, 1)
        samples = [store.get(ref) for ref in source.window(seqs, seqs).refs if ref is not None]
        time.sleep(step_s)
        for _, handle in samples:
            store.release(handle)
        source.applied(list(seqs), seqs.stop, window + 1)
        if window % SAVE_EVERY == 0:
            source.durable(seqs.stop, window + 1)
        trained.send([int(tensors["last_hidden_state"][0, 0]) for tensors, _ in samples])
    source.finish("completed")
    trained.send(None)
    store.close()


def soak(folder: Path, num_samples: int, step_s: float = STEP_S) -> Report:
    context = multiprocessing.get_context("spawn")
    report = Report()
    with LocalMooncake(capacity_bytes=64 << 20, log_dir=folder) as mooncake:
        places = {name: getattr(mooncake, name) for name in ("master_address", "client_address", "metrics_address")}
        receiver, sender = context.Pipe(duplex=False)
        log = folder / "log"
        with (
            started(context.Process(target=produce, args=(log, places))) as producer,
            started(context.Process(target=train, args=(log, places, num_samples, step_s, sender))) as trainer,
        ):
            sender.close()  # the trainer's death ends `recv`
            watch(report, receiver, log, producer.pid, trainer.pid)
            for process in (trainer, producer):
                process.join(30)
                assert process.exitcode == 0
        store = MooncakeFeatureStore("soak", **places)
        report.left_in_store = store.health()["num_samples"]
        store.close()
    return report


@contextmanager
def started(process: Any) -> Iterator[Any]:
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def watch(report: Report, receiver: Any, log: Path, producer: int, trainer: int) -> None:
    """Measure until the trainer ends."""
    window = receiver.recv()
    ledger = resolve_control_plane("disaggregated", "run", path=log).ledger
    start = last = time.monotonic()
    while window is not None:
        report.trained.append(window)
        status = ledger.status()
        report.most_refs = max(report.most_refs, status["refs_in_flight"])
        report.most_bytes = max(report.most_bytes, status["bytes_in_flight"])
        report.capture_waits = status["capture_waits"]
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            report.producer_kb.append(resident_kb(producer))
            report.trainer_kb.append(resident_kb(trainer))
            report.file_bytes.append(sum(path.stat().st_size for path in log.iterdir() if path.exists()))
        window = receiver.recv()
    report.seconds = time.monotonic() - start
    ledger.close()


def resident_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--step-seconds", type=float, default=STEP_S)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), options.samples, options.step_seconds)
    seqs = [seq for window in report.trained for seq in window]
    print(f"{len(seqs)} samples in {report.seconds:.0f} s, each once and in order: {seqs == list(range(options.samples))}")
    print(f"most in flight: {report.most_refs} of {MARKS.high_refs} refs, {report.most_bytes} of {MARKS.high_bytes} bytes")
    print(f"capture waited for the trainer {report.capture_waits} times; left in the store: {report.left_in_store} samples")
    print("| of the run | producer, MB | trainer, MB | log and ledger, kB |")
    print("|---|---|---|---|")
    for tenth in range(1, 11):
        at = len(report.file_bytes) * tenth // 10 - 1
        producer, trainer = report.producer_kb[at] / 1024, report.trainer_kb[at] / 1024
        print(f"| {10 * tenth} % | {producer:.1f} | {trainer:.1f} | {report.file_bytes[at] / 1000:.0f} |")


if __name__ == "__main__":
    main()
