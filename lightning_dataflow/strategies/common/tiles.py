"""Tiles of logits: a few rows at a time, in memory that the next tile reuses."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dataflow.targets.logits import LogitsTransform

TILE_ROWS = 512
"""Rows of logits held at once; the full [positions, V] never are."""


def tiles(num_rows: int, logits_per_row: int = 1) -> Iterator[slice]:
    """Slices that cover `num_rows` rows, each of which has so many rows of logits."""
    size = max(1, TILE_ROWS // logits_per_row)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of matrix products: autocast's if it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def sum_dtype(x: Tensor) -> torch.dtype:
    """Of sums over many rows: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [N, T] · right [T, M] to `total`; in place where their dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class LogitTile:
    """Logits of one tile [T, V] and what cross-entropy needs of them. They are turned into a gradient in place.

    Args:
        logits: float32 or float64; overwritten. With a transform, the products that it turns into logits.
        labels: [T].
    """

    def __init__(self, logits: Tensor, labels: Tensor, transform: LogitsTransform | None = None):
        self._slope = None if transform is None else transform.slope(transform.apply_(logits))
        top, index = logits.max(-1)
        of_label = logits.gather(-1, labels[:, None]).squeeze(-1)
        self.probabilities = torch.softmax(logits, -1, out=logits)
        of_top = self.probabilities.gather(-1, index[:, None]).squeeze(-1)
        self.cross_entropy = top - of_top.log() - of_label
        self.correct = index == labels
        self._labels = labels[:, None]

    def subtract_label(self) -> None:
        """Make `probabilities` d cross-entropy / d logits, or with a transform / d products."""
        self.probabilities.scatter_add_(-1, self._labels, self.probabilities.new_full(self._labels.shape, -1))
        if self._slope is not None:
            self.probabilities.mul_(self._slope)


class TileBuffer:
    """Memory that the products of all tiles share."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left [T, K] · right [K, V] in float32 at least, valid until the next call."""
        if left.dtype not in (torch.float32, torch.float64):
            return (left @ right).float()
        if self._memory is None:
            self._memory = left.new_empty(len(left), right.shape[1])
        return torch.mm(left, right, out=self._memory[: len(left)])
