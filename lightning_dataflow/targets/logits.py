"""What some targets do to the product of their head and the last hidden state."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_dataflow.contracts import UserError

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_MULTIPLY_BY_DIVISORS = "hyperclovax"
"""Models with this prefix multiply by `logits_scaling`."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, kw_only=True)
class LogitsTransform:
    """logits = cap · tanh(scale · (head · h + bias) / cap), or scale · (head · h + bias) without a cap.

    Attributes:
        scale: positive.
        cap: None for no cap.
        bias: [V] in float32 at least, None for none.
    """

    scale: float = 1.0
    cap: float | None = None
    bias: Tensor | None = field(default=None, compare=False)

    @property
    def is_identity(self) -> bool:
        """Whether logits are the plain product."""
        return self.scale == 1 and self.cap is None and self.bias is None

    def apply_(self, products: Tensor) -> Tensor:
        """Turn products [..., V] of the head and hidden states into logits, in place."""
        if self.bias is not None:
            products += self.bias
        if self.cap is not None:
            return products.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return products if self.scale == 1 else products.mul_(self.scale)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d products, at logits [..., V] that `apply_` returned."""
        if self.cap is None:
            return self.scale
        return (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)


IDENTITY = LogitsTransform()


def read_logits_transform(config: Any, where: str) -> LogitsTransform:
    """Scale and cap by the names that configurations have for them; a bias stands in the weights.

    Raises:
        UserError: a value is no positive number.
    """
    scale, cap = 1.0, None
    for name in (*_FACTORS, *_DIVISORS, *_CAPS):
        value = getattr(config, name, None)
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value < math.inf or (value == 0 and name not in _CAPS):
            raise UserError(f"{where}: {name}={value!r} is no positive number: correct it, or fetch the file again")
        if name in _CAPS:
            cap = float(value) or cap
        elif name in _DIVISORS and not str(config.model_type).startswith(_MULTIPLY_BY_DIVISORS):
            scale /= value
        else:
            scale *= value
    return LogitsTransform(scale=scale, cap=cap)
