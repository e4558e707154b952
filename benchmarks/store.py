"""Put → get → free between two processes, through Mooncake and through what bounds it.

`python -m benchmarks.store` starts a Mooncake, a producer and a consumer, and prints one table a sample size: samples of
four tensors as EAGLE3 needs them (H = 2048, bfloat16), four in flight, both sides working at once, one thread each. The
contenders' windows are interleaved, so that a slow minute of the machine hits all; numbers are medians. CPU seconds count
every process involved, Mooncake's too. The first pass is verified and not timed. It never asserts a time.
"""

import argparse
import io
import itertools
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch

from lightning_dataflow.contracts import CaptureSpec, SampleOrigin
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.stores import MooncakeFeatureStore
from lightning_dataflow.stores.mooncake.client import MooncakeClient

HIDDEN = 2048
SIZES_MB = (1, 8, 64)
WINDOW = 4
SLOT_BYTES = 72 << 20
WINDOW_BYTES = 256 << 20
MAX_FOREIGN, MAX_REPEATS = 0.1, 5
ORIGIN = SampleOrigin(
    sample_id="run:0",
    run_id="run",
    source_task_id="0",
    source_id="0",
    capture=CaptureSpec(layer_ids=(0,), norm="post", hidden_size=HIDDEN),
    target_model_version="m",
    tokenizer_version="t",
    num_tokens=1,
)
STORES = {"Mooncake, shared memory": "ss", "Mooncake, TCP → shared memory": "ts", "Mooncake, TCP both": "tt"}
OTHERS = ("/dev/shm ring", "one TCP socket", "torch.save, shared memory")

Sample = dict[str, torch.Tensor]
Announce = Callable[[Any], None]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def make_sample(megabytes: int) -> Sample:
    """The same on both sides."""
    generator = torch.Generator().manual_seed(megabytes)
    tokens = megabytes * (1 << 20) // (8 * HIDDEN)
    return {
        "input_ids": torch.randint(50_000, (tokens,), generator=generator),
        "loss_mask": torch.randint(2, (tokens,), generator=generator, dtype=torch.uint8),
        "aux_hidden_states": torch.randn(tokens, 3 * HIDDEN, generator=generator).bfloat16(),
        "last_hidden_state": torch.randn(tokens, HIDDEN, generator=generator).bfloat16(),
    }


def payload(sample: Sample) -> int:
    return sum(tensor.nbytes for tensor in sample.values())


class Store:
    """The feature store, as the product uses it."""

    def __init__(self, places: dict[str, Any], transports: str, is_producer: bool):
        near = transports[0 if is_producer else 1] == "s"
        options = {name: places[name] for name in ("master_address", *(["client_address"] if near else []))}
        self.store = MooncakeFeatureStore(f"bench-{transports}", **options)
        self.numbers = itertools.count()

    def send(self, sample: Sample, announce: Announce) -> None:
        origin = replace(ORIGIN, sample_id=f"run:{next(self.numbers)}", num_tokens=len(sample["input_ids"]))
        announce(self.store.put(sample, origin))

    def receive(self, refs: list[Any]) -> list[Sample]:
        found = self.store.get_many(refs)
        self.store.release_many([handle for _, handle in found])
        return [sample for sample, _ in found]


class Pickle:
    """torch.save and torch.load, the bytes through the same Mooncake's shared memory."""

    def __init__(self, places: dict[str, Any]):
        addresses = {name: places[name] for name in ("master_address", "client_address")}
        self.client = MooncakeClient(**addresses, zero_copy=False)
        self.numbers = itertools.count()

    def send(self, sample: Sample, announce: Announce) -> None:
        buffer = io.BytesIO()
        torch.save(sample, buffer)
        key = f"pickle/{next(self.numbers)}"
        assert self.client._put_plain(key, buffer.getvalue()) == 0
        announce(key)

    def receive(self, keys: list[str]) -> list[Sample]:
        samples = [torch.load(io.BytesIO(self.client._store.get(key)), weights_only=True) for key in keys]
        self.client.remove(keys)
        return samples


class Ring:
    """A preallocated /dev/shm file: one copy in, one copy out to memory that is used again. The least that can be done."""

    def __init__(self, name: str, targets: dict[int, Sample]):
        self.memory = SharedMemory(name)
        self.slots = torch.frombuffer(self.memory.buf, dtype=torch.uint8)[: WINDOW * SLOT_BYTES].view(WINDOW, SLOT_BYTES)
        self.numbers = itertools.count()
        self.targets = targets

    def parts(self, slot: int, sample: Sample) -> list[torch.Tensor]:
        sizes = [tensor.nbytes for tensor in sample.values()]
        return list(self.slots[slot, : sum(sizes)].split(sizes))

    def send(self, sample: Sample, announce: Announce) -> None:
        slot = next(self.numbers) % WINDOW
        for part, tensor in zip(self.parts(slot, sample), sample.values(), strict=True):
            part.copy_(flat(tensor))
        announce((slot, payload(sample)))

    def receive(self, tokens: list[tuple[int, int]]) -> list[Sample]:
        for slot, size in tokens:
            target = self.targets[size]
            for part, tensor in zip(self.parts(slot, target), target.values(), strict=True):
                flat(tensor).copy_(part)
        return [target]


class Socket:
    """One loopback connection, received into memory that is used again."""

    def __init__(self, is_producer: bool, peer: Connection, targets: dict[int, Sample]):
        if is_producer:
            self.connection = socket.create_connection(("127.0.0.1", peer.recv()))
        else:
            with socket.create_server(("127.0.0.1", 0)) as server:
                peer.send(server.getsockname()[1])
                self.connection, _ = server.accept()
        self.targets = targets

    def send(self, sample: Sample, announce: Announce) -> None:
        announce(payload(sample))
        for tensor in sample.values():
            self.connection.sendall(flat(tensor).numpy())

    def receive(self, sizes: list[int]) -> list[Sample]:
        for size in sizes:
            for tensor in self.targets[size].values():
                view = memoryview(flat(tensor).numpy())
                while view:
                    view = view[self.connection.recv_into(view) :]
        return [self.targets[sizes[0]]]


def serve(is_producer: bool, places: dict[str, Any], parent: Connection, peer: Connection) -> None:
    """One side: does what the parent asks until it says None."""
    torch.set_num_threads(1)
    samples = {size: make_sample(size) for size in SIZES_MB}
    targets = {payload(sample): {key: torch.zeros_like(t) for key, t in sample.items()} for sample in samples.values()}
    ends: dict[str, Any] = {name: Store(places, transports, is_producer) for name, transports in STORES.items()}
    others = (Ring(places["ring"], targets), Socket(is_producer, peer, targets), Pickle(places))
    ends |= zip(OTHERS, others, strict=True)
    parent.send("ready")
    while (order := parent.recv()) is not None:
        name, size, count, verify = order
        if is_producer:
            parent.send(produce(ends[name], samples[size], count, peer))
        else:
            consume(ends[name], samples[size] if verify else None, count, peer)


def produce(end: Any, sample: Sample, count: int, peer: Connection) -> float:
    """Seconds until the last of `count` samples is acknowledged."""
    began = time.perf_counter()
    for index in range(count + WINDOW):
        if index >= WINDOW:
            peer.recv()
        if index < count:
            end.send(sample, peer.send)
    return time.perf_counter() - began


def consume(end: Any, expected: Sample | None, count: int, peer: Connection) -> None:
    """Reads what is there at once, as the trainer does with the samples of a window."""
    while count:
        announced = [peer.recv()]
        while peer.poll() and len(announced) < WINDOW:
            announced.append(peer.recv())
        samples = end.receive(announced)
        if expected is not None:
            assert all(torch.equal(sample[key], tensor) for sample in samples for key, tensor in expected.items())
        del samples
        for _ in announced:
            peer.send(True)
        count -= len(announced)


def cpu_seconds(pids: list[int]) -> tuple[float, float, float]:
    """User and system time of these processes, and user time of the whole machine."""
    user = system = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        user, system = user + int(fields[11]), system + int(fields[12])
    with open("/proc/stat") as file:
        _, everybody, niced, *_ = file.readline().split()
    return tuple(ticks / os.sysconf("SC_CLK_TCK") for ticks in (user, system, int(everybody) + int(niced)))


def measure(ends: list[Connection], pids: list[int], rounds: int) -> None:
    """Run all windows and print the tables. A window that others used over a tenth of the machine in is repeated later."""
    for size in SIZES_MB:
        each = payload(make_sample(size))
        count = max(2 * WINDOW, WINDOW_BYTES // each)
        gigabytes = count * each / 1e9
        speeds: dict[str, list[float]] = {name: [] for name in (*STORES, *OTHERS)}
        costs: dict[str, list[float]] = {name: [] for name in speeds}
        for index in range(1 + MAX_REPEATS * rounds):
            for name in [name for name in speeds if len(speeds[name]) < rounds]:
                before = cpu_seconds(pids)
                for end in ends:
                    end.send((name, size, count, index == 0))
                seconds = ends[0].recv()
                user, system, everybody = (now - then for now, then in zip(cpu_seconds(pids), before, strict=True))
                if index and everybody - user < MAX_FOREIGN * seconds * (os.cpu_count() or 1):
                    speeds[name].append(gigabytes / seconds)
                    costs[name].append((user + system) / gigabytes)
        print_table(f"{size} MB samples ({each} bytes), {rounds} windows of {count}", speeds, costs)


def print_table(title: str, speeds: dict[str, list[float]], costs: dict[str, list[float]]) -> None:
    print(f"\n{title}\n{'':32}  GB/s   (min–max)    / ring  / socket  / pickle  cpu-s/GB")
    middle = {name: statistics.median(values or [math.nan]) for name, values in speeds.items()}
    for name, values in speeds.items():
        if not values:
            print(f"{name:32}never undisturbed")
            continue
        ring, wire, pickle = (middle[name] / middle[other] for other in OTHERS)
        spread, cost = f"({min(values):.2f}–{max(values):.2f})", statistics.median(costs[name])
        print(f"{name:32}{middle[name]:6.2f} {spread:>13} {ring:8.2f} {wire:9.2f} {pickle:9.1f} {cost:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    context = multiprocessing.get_context("spawn")
    ring = SharedMemory(create=True, size=WINDOW * SLOT_BYTES)
    with tempfile.TemporaryDirectory() as logs, LocalMooncake(capacity_bytes=1 << 30, log_dir=logs, warm=True) as mooncake:
        places = {name: getattr(mooncake, name) for name in ("master_address", "client_address")} | {"ring": ring.name}
        ends, children = [], []
        for is_producer, peer in zip((True, False), context.Pipe(), strict=True):
            here, there = context.Pipe()
            ends.append(here)
            children.append(context.Process(target=serve, args=(is_producer, places, there, peer)))
            children[-1].start()
        for end in ends:
            end.recv()
        processes = (*children, *(server.process for server in mooncake.servers))
        measure(ends, [process.pid for process in processes], rounds)
        for end, child in zip(ends, children, strict=True):
            end.send(None)
            child.join()
    ring.close()
    ring.unlink()


if __name__ == "__main__":
    main()
