"""PyTorch's flex attention, compiled on CUDA."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Flex attention, compiled on CUDA: query [B, heads, Q, D], key and value [B, kv_heads, K, D]; heads is a multiple of
    kv_heads. Returns [B, heads, Q, D].

    Left to itself, Inductor chooses the decoding kernel below 128 queries, and finds no valid one for some ratios of heads
    to key-value heads. The general kernel takes any shape.
    """
    from torch.nn.attention.flex_attention import flex_attention

    attend = compiled(flex_attention) if query.is_cuda else flex_attention
    return attend(query, key, value, block_mask=mask, enable_gqa=True, kernel_options={"BACKEND": "TRITON"})


def flex_mask(
    visible: Callable[..., Tensor], batch: int | None, num_queries: int, num_keys: int, device: torch.device
) -> Any:
    """Flex attention's mask of [num_queries, num_keys] from `visible(row, head, query, key)`, shared by all rows if `batch`
    is None. Compiled on CUDA: without compilation it would materialise every entry of the mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    # Dynamic from the start: batches have many lengths, and Dynamo gives up on a function after 8 compilations.
    make = compiled(create_block_mask, dynamic=True) if device.type == "cuda" else create_block_mask
    return make(visible, batch, None, num_queries, num_keys, device=device)


@cache
def compiled(function: Any, dynamic: bool | None = None) -> Any:
    """The function, compiled once; see torch.compile for `dynamic`."""
    return torch.compile(function, dynamic=dynamic)
