"""Encodes records in this process, and in one for each core if it takes long."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.encoding import EncodedSample, Encoder
from lightning_dataflow.prompts.sources import Record
from lightning_dataflow.prompts.template import Unusable

CHUNK = 64
ALONE_S = 2.0
"""Processes are started when this process alone has worked for so long."""
PR_SET_PDEATHSIG = 1

Numbered = tuple[int, Record]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a record.

    Attributes:
        number: of the record, from 1.
        error: why it is broken.
        reasons: why it, or a turn of it, is not trained on.
    """

    number: int
    samples: Sequence[EncodedSample] = ()
    error: str | None = None
    reasons: Counter[str] = field(default_factory=Counter)


def encode_record(encoder: Encoder, number: int, record: Record, format: str) -> Outcome:
    """Raises UserError if the fault is not the record's: there is no chat template, or it is not valid."""
    try:
        sample = encoder.read(record, format)
    except UserError as error:
        return Outcome(number=number, error=str(error))
    try:
        samples, turns = encoder.encode(sample)
    except Unusable as reason:
        return Outcome(number=number, reasons=Counter([str(reason)]))
    return Outcome(number=number, samples=samples, reasons=Counter(f"turn: {turn.reason}" for turn in turns if turn.reason))


def encode_all(records: Iterable[Record], encoder: Encoder, format: str) -> Iterator[Outcome]:
    """The outcome of every record, in their order."""
    numbered = enumerate(records, start=1)
    chunks = iter(lambda: list(islice(numbered, CHUNK)), [])
    began = time.monotonic()
    for chunk in chunks:
        yield from _encode_chunk(encoder, chunk, format)
        if time.monotonic() - began > ALONE_S and sys.platform == "linux":
            break
    yield from _encode_in_processes(chunks, encoder, format)


def _encode_in_processes(chunks: Iterator[list[Numbered]], encoder: Encoder, format: str) -> Iterator[Outcome]:
    """Forked processes have the encoder already. Only Linux forks safely; nothing here uses torch or a GPU."""
    first = next(chunks, None)
    if first is None:
        return
    num_processes = len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(
        num_processes,
        multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encoder, format, os.getpid()),
    )
    running: deque[Future[list[Outcome]]] = deque()
    try:
        for chunk in chain([first], chunks):
            running.append(pool.submit(_encode_in_worker, chunk))
            if len(running) >= 4 * num_processes:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a process that tokenises prompts was killed, perhaps for lack of memory: run again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_chunk(encoder: Encoder, chunk: Sequence[Numbered], format: str) -> list[Outcome]:
    return [encode_record(encoder, number, record, format) for number, record in chunk]


_of_worker: tuple[Encoder, str]


def _start_worker(encoder: Encoder, format: str, parent: int) -> None:
    """Ctrl-C is for the parent, which ends its workers; they end with it also when it is killed."""
    global _of_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _of_worker = encoder, format


def _encode_in_worker(chunk: Sequence[Numbered]) -> list[Outcome]:
    encoder, format = _of_worker
    return _encode_chunk(encoder, chunk, format)
