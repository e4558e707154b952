"""Registered memory that is reused: fresh pages and registrations cost more than the copy into them."""

import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

ALIGNMENT = 64
SMALLEST_STEP = 1 << 16
MAX_IDLE_BYTES = 2 << 30


class Block(NamedTuple):
    """Memory that a transfer may use."""

    address: int
    num_bytes: int


class RegisteredMemory:
    """Blocks of a raw allocator, each registered as a whole. Thread-safe if the allocator is.

    Args:
        alloc, free: size → address, 0 when there is no memory; and its reverse.
        register, unregister: (address, size), raises when it cannot; and its reverse.
    """

    def __init__(
        self,
        alloc: Callable[[int], int],
        free: Callable[[int], object],
        register: Callable[[int, int], None],
        unregister: Callable[[int], object],
    ):
        self._alloc, self._free = alloc, free
        self._register, self._unregister = register, unregister

    def allocate(self, num_bytes: int) -> Block:
        """A registered block of exactly this size, aligned to pages."""
        address = self._alloc(num_bytes)
        if not address:
            raise MemoryError(f"no memory for a transfer buffer of {num_bytes} bytes: free memory, or use smaller samples")
        try:
            self._register(address, num_bytes)
        except BaseException:
            self._free(address)
            raise
        return Block(address, num_bytes)

    def free(self, block: Block) -> None:
        """Unregister a block and give it back."""
        self._unregister(block.address)
        self._free(block.address)


class PageAllocator:
    """Anonymous pages of this process; `alloc` and `free` for RegisteredMemory."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}

    def alloc(self, num_bytes: int) -> int:
        """Address of new pages."""
        pages = mmap.mmap(-1, num_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self._maps[address] = pages
        return address

    def free(self, address: int) -> None:
        """Unmap them."""
        del self._maps[address]


class BufferPool:
    """Hands out buffers and takes them back when the last tensor that uses one is gone. Thread-safe.

    Args:
        memory: where new blocks come from.
        max_idle_bytes: kept for reuse; beyond it, the blocks that were unused for longest are freed.
    """

    def __init__(self, memory: RegisteredMemory, *, max_idle_bytes: int = MAX_IDLE_BYTES):
        self._memory = memory
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[Block] = []  # unused for longest first
        self._returned: deque[Block] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def lease(self, num_bytes: int) -> ctypes.Array:
        """A writable buffer of at least `num_bytes`, with undefined content.

        A tensor made of it by `torch.frombuffer` keeps it alive. Its memory is reused once nothing references it.
        """
        with self._lock:
            self._collect()
            block = self._take(num_bytes)
        if block is None:
            block = self._memory.allocate(size_class(num_bytes))
            ctypes.memset(block.address, 0, block.num_bytes)  # page faults now, not during the first transfer
        buffer = (ctypes.c_ubyte * block.num_bytes).from_address(block.address)
        weakref.finalize(buffer, self._give_back, block).atexit = False
        return buffer

    def close(self) -> None:
        """Free idle memory. Buffers that are still referenced stay valid, and are freed once they no longer are."""
        self._closed = True
        with self._lock:
            self._collect()
            self._free_beyond(0)

    def _give_back(self, block: Block) -> None:
        # The last reference may go during a garbage collection while this thread holds the lock: do not take it here.
        if self._closed:
            self._memory.free(block)
        else:
            self._returned.append(block)

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
        self._free_beyond(self._max_idle_bytes)

    def _free_beyond(self, max_idle_bytes: int) -> None:
        idle_bytes = sum(block.num_bytes for block in self._idle)
        while idle_bytes > max_idle_bytes:
            block = self._idle.pop(0)
            idle_bytes -= block.num_bytes
            self._memory.free(block)

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
