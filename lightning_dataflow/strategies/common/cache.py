"""Keys and values that a draft keeps while it decodes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DraftCache:
    """Keys and values [1, kv_heads, length, head_dim] of one sequence while decoding."""

    key: Tensor | None = None
    value: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of cached positions."""
        return 0 if self.key is None else self.key.shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions at the end and return everything cached."""
        self.key = key if self.key is None else torch.cat((self.key, key), dim=2)
        self.value = value if self.value is None else torch.cat((self.value, value), dim=2)
        return self.key, self.value

    def crop(self, length: int) -> None:
        """Forget positions from `length` on."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]
