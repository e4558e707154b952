"""Buffers are recycled, and never while somebody uses them."""

import ctypes
import gc
import mmap
import threading

import pytest
import torch

from lightning_dataflow.stores.mooncake import buffers
from lightning_dataflow.stores.mooncake.buffers import Block, BufferPool, offsets, size_class


class Memory:
    """Stands for a client: remembers the blocks that it has handed out."""

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}
        self.num_allocated = 0

    def allocate(self, num_bytes: int) -> Block:
        pages = mmap.mmap(-1, num_bytes)
        block = Block(ctypes.addressof(ctypes.c_char.from_buffer(pages)), num_bytes, pages)
        self.blocks[block.address] = block
        self.num_allocated += 1
        return block

    def free(self, block: Block) -> None:
        del self.blocks[block.address]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def pool(memory: Memory) -> BufferPool:
    return BufferPool(memory.allocate, memory.free)


def tensor(buffer: ctypes.Array, count: int = 1000) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8, count=count)


def test_steady_state_allocates_nothing(pool, memory):
    for index in range(100):  # three at a time, lengths that differ
        held = [pool.lease(1_000_000 + 1000 * (index % 7)) for _ in range(3)]
        del held
    assert len(memory.blocks) == memory.num_allocated == 3


def test_what_is_referenced_is_never_used_again(pool, memory):
    kept = tensor(pool.lease(1000)).fill_(7)
    part = kept.view(10, 100)[3]  # a view of a view is enough to keep it
    del kept
    gc.collect()
    for _ in range(5):
        tensor(pool.lease(1000)).fill_(9)
    assert part.eq(7).all()
    assert memory.num_allocated == 2


def test_a_buffer_fits(pool):
    for size in (1, 64, 65, 4096, 1 << 20, (1 << 20) + 1):
        buffer = pool.lease(size)
        assert len(buffer) >= size
        assert ctypes.addressof(buffer) % 4096 == 0
        ctypes.memset(buffer, 1, size)


def test_a_small_sample_does_not_take_a_big_block(pool):
    big = pool.lease(64 << 20)
    del big
    small = pool.lease(1000)
    assert len(small) < 1 << 20


def test_idle_memory_is_bounded(pool, memory, monkeypatch):
    monkeypatch.setattr(buffers, "MAX_IDLE_BYTES", 3 << 20)
    held = [pool.lease(1 << 20) for _ in range(8)]
    assert sum(block.num_bytes for block in memory.blocks.values()) == 8 << 20
    del held
    pool.lease(1 << 20)
    assert sum(block.num_bytes for block in memory.blocks.values()) <= 3 << 20


def test_after_close_tensors_stay_valid(pool, memory):
    kept = tensor(pool.lease(1000)).fill_(7)
    pool.lease(1000)
    pool.close()
    assert len(memory.blocks) == 1
    assert kept.eq(7).all()
    del kept
    assert not memory.blocks


def test_many_threads_never_share_a_buffer(pool, memory):
    torn: list[int] = []

    def work(worker: int) -> None:
        for index in range(300):
            mine = tensor(pool.lease(1000 + 500 * (index % 40))).fill_(worker)
            if not mine.eq(worker).all():
                torn.append(worker)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not torn
    assert memory.num_allocated < 100


def test_sizes_are_rounded_by_an_eighth_at_most():
    for size in (1, 100, 1 << 16, 10**6, 10**8, 3 * 10**9 + 1):
        assert size <= size_class(size) <= max(1 << 16, size + size // 8)


def test_parts_are_aligned_and_apart():
    starts, total = offsets([1, 64, 65, 0, 3])
    assert starts == [0, 64, 128, 256, 256]
    assert total == 320
