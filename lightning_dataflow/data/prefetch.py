"""Fetch ahead: a thread reads, collates and copies to the device while the trainer computes."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities import apply_to_collection

from lightning_dataflow.contracts.waiting import said_if_long
from lightning_dataflow.data.collate import Batch

JOIN_TIMEOUT_S = 30.0


class Prefetcher:
    """Iterates `batches` in a thread, up to `depth` ahead of the reader.

    On a GPU the thread also pins each batch and copies it on a stream of its own. The reader's stream waits for the copy;
    the reader does not. An exception in the thread reaches the reader after the batches before it.

    Args:
        batches: used by the thread only.
        depth: how many batches wait at most; one more is being made.
        device: where batches go.
    """

    def __init__(self, batches: Iterator[Batch], *, depth: int, device: torch.device):
        assert depth > 0, "reading nothing ahead needs no thread"
        self._batches = batches
        self._ready: queue.SimpleQueue[tuple[Batch | None, Any]] = queue.SimpleQueue()
        # No semaphore: it is Python code, and an interrupt inside of it leaves it locked for good.
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._room.put(None)
        self._stop = threading.Event()
        self._device = device
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        """Batches, on the device."""
        while True:
            batch, event = self._ready.get()
            if self._stop.is_set():
                return
            self._room.put(None)
            if batch is None:
                if event is not None:
                    raise event
                return
            if event is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(event)
                apply_to_collection(batch, torch.Tensor, torch.Tensor.record_stream, current)
            yield batch

    def close(self) -> None:
        """End the thread, and a reader's wait for it. Raises RuntimeError when it does not end in time."""
        self._stop.set()
        self._room.put(None)
        self._ready.put((None, None))
        with said_if_long("the prefetch thread to end its read"):
            self._thread.join(JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            raise RuntimeError(f"the prefetch thread did not end within {JOIN_TIMEOUT_S:.0f} s: it hangs in a read")

    def _run(self) -> None:
        try:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            for batch in self._batches:
                copied = (batch, None) if stream is None else _copy_on(stream, batch)
                self._room.get()
                if self._stop.is_set():
                    return
                self._ready.put(copied)
            self._ready.put((None, None))
        except BaseException as error:  # the reader raises it
            self._ready.put((None, error))


def _copy_on(stream: torch.cuda.Stream, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
    """The batch on the stream's device, complete once the event has passed."""
    with torch.cuda.stream(stream):
        return copy_to(stream.device, batch), stream.record_event()


def copy_to(device: torch.device, batch: Batch) -> Batch:
    """Copy all tensors, also those within tuples and dicts, without waiting: the source is in pinned memory."""
    return apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
