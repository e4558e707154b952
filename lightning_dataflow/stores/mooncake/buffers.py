"""Registered memory that is reused: fresh pages and registrations cost more than the copy into them."""

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from mmap import mmap
from typing import NamedTuple

ALIGNMENT = 64
SMALLEST_STEP = 1 << 16
MAX_IDLE_BYTES = 2 << 30
"""Kept for reuse; beyond it, the blocks that were unused for longest are freed."""


class Block(NamedTuple):
    """Memory that a transfer may use.

    Attributes:
        pages: what keeps it, where it is of this process; None for a foreign allocator's.
    """

    address: int
    num_bytes: int
    pages: mmap | None


class BufferPool:
    """Hands out buffers and takes them back when the last tensor that uses one is gone. Thread-safe.

    Args:
        allocate, free: get a block of exactly this size, aligned to pages; and give it back.
    """

    def __init__(self, allocate: Callable[[int], Block], free: Callable[[Block], None]):
        self._allocate, self._free = allocate, free
        self._idle: list[Block] = []  # unused for longest first
        self._returned: deque[Block] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def lease(self, num_bytes: int) -> ctypes.Array:
        """A writable buffer of at least `num_bytes`, with undefined content.

        A tensor made of it by `torch.frombuffer` keeps it alive. Its memory is reused once nothing references it.
        """
        with self._lock:
            self._collect(MAX_IDLE_BYTES)
            block = self._take(num_bytes)
        if block is None:
            block = self._allocate(size_class(num_bytes))
            ctypes.memset(block.address, 0, block.num_bytes)  # page faults now, not during the first transfer
        buffer = (ctypes.c_ubyte * block.num_bytes).from_address(block.address)
        weakref.finalize(buffer, self._give_back, block).atexit = False
        return buffer

    def close(self) -> None:
        """Free idle memory. Buffers that are still referenced stay valid, and are freed once they no longer are."""
        self._closed = True
        with self._lock:
            self._collect(0)

    def _give_back(self, block: Block) -> None:
        # The last reference may go during a garbage collection while this thread holds the lock: do not take it here.
        if self._closed:
            self._free(block)
        else:
            self._returned.append(block)

    def _collect(self, max_idle_bytes: int) -> None:
        """Take in what was given back, and free what is too much."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        idle_bytes = sum(block.num_bytes for block in self._idle)
        while idle_bytes > max_idle_bytes:
            block = self._idle.pop(0)
            idle_bytes -= block.num_bytes
            self._free(block)

    def _take(self, num_bytes: int) -> Block | None:
        """The smallest block that fits and, among equals, the one used last: its pages are likely to be in a cache."""
        limit = 2 * size_class(num_bytes)
        fitting = [block for block in reversed(self._idle) if num_bytes <= block.num_bytes <= limit]
        if not fitting:
            return None
        block = min(fitting, key=lambda block: block.num_bytes)
        self._idle.remove(block)
        return block


def size_class(num_bytes: int) -> int:
    """`num_bytes` rounded up by at most an eighth, so that samples of similar lengths share blocks."""
    step = max(SMALLEST_STEP, 1 << max(0, num_bytes.bit_length() - 4))
    return -(-num_bytes // step) * step


def offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where parts of these sizes start in one buffer, aligned for every dtype, and the size of that buffer."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end
