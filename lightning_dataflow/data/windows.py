"""Deterministic sharding: one order of samples for every topology, world size and micro-batch size.

A seq numbers samples across passes: pass p of n samples is seqs [p·n, (p + 1)·n), each pass in an order of its own.
Window b of global batch G is seqs [b·G, (b + 1)·G); every rank takes its contiguous slice. So the samples of a step
depend on (seed, G) alone.
"""

from functools import lru_cache

import torch

from lightning_dataflow.contracts import UserError


class PassOrder:
    """Maps seqs to samples.

    Args:
        num_samples: n, samples in a pass.
        seed: of the permutations.
    """

    def __init__(self, num_samples: int, seed: int):
        assert num_samples > 0, "sources refuse to be empty"
        self.num_samples = num_samples
        self.seed = seed

    def locate(self, seq: int) -> tuple[int, int]:
        """(index of the sample, pass)."""
        pass_index, position = divmod(seq, self.num_samples)
        return _permutation(self.num_samples, self.seed, pass_index)[position], pass_index


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, pass_index: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed << 20) + pass_index)
    return torch.randperm(num_samples, generator=generator).tolist()


def rank_slice(window: int, global_batch_size: int, rank: int, world_size: int) -> range:
    """Seqs of `rank` in `window`."""
    share = global_batch_size // world_size
    start = window * global_batch_size + rank * share
    return range(start, start + share)


def accumulation(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per optimizer step and rank. Raises UserError unless the sizes divide."""
    rows = micro_batch_size * world_size
    if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % rows:
        raise UserError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} × "
            f"{world_size} ranks = {rows}: change one of the three"
        )
    return global_batch_size // rows
