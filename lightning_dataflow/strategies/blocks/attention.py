"""Attention of drafted blocks.

A block sees the context of its sample strictly before its anchor, all of itself, and no other block. With a sliding window
of w positions, offset k at anchor a sees context from a + k − (w − 1) on, and itself causally.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.common.flex import flex, flex_mask
from lightning_dataflow.strategies.common.tiles import sum_dtype

CHUNK_BLOCKS = 8
"""Blocks attended together on a CPU: their anchors are neighbours, so little of the context is masked out."""


class ContextKeys(NamedTuple):
    """Keys and values [batch, kv_heads, S, D] of the context, and [M, kv_heads, B, D] of the blocks, rotated."""

    context_key: Tensor
    context_value: Tensor
    block_key: Tensor
    block_value: Tensor


def block_attention(query: Tensor, keys: ContextKeys, blocks: Blocks, window: int | None = None) -> Tensor:
    """Attention of M blocks of B positions, in time linear in M and in S, without an [M·B, S] mask.

    Args:
        query: [M, heads, B, D]; heads is a multiple of kv_heads.
        window: w of a sliding window; None for the whole context.

    Returns [M, heads, B, D].
    """
    if query.device.type == "cpu":
        return _ChunkedBlockAttention.apply(query, *keys, blocks, window)
    return _flex_block_attention(query, keys, blocks, window)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Attention of the one block at the end, for decoding: query [1, heads, B, D], key and value [1, kv_heads, m, D] of
    context and block."""
    mask = None
    if window is not None:
        position = torch.arange(key.shape[2], device=query.device)
        mask = _within(position[-query.shape[2] :, None], position, window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _within(position: Tensor, key_position: Tensor, window: int) -> Tensor:
    return (key_position <= position) & (key_position > position - window)


class _Chunk(NamedTuple):
    """Blocks [start, stop) of one sample, and the part [first, last) of its row that one of them sees."""

    start: int
    stop: int
    row: int
    first: int
    last: int


class _ChunkedBlockAttention(torch.autograd.Function):
    """Flash attention, chunk by chunk. The backward pass builds the masks again and adds up the gradients of the context in
    place."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, *inputs: Any) -> Tensor:
        *keys, blocks, window = inputs
        chunks = _chunks(blocks, window)
        out, lse = torch.empty_like(query), []
        for chunk in chunks:
            part = _ChunkInputs.take(query, ContextKeys(*keys), chunk, blocks, window)
            attended, lse_of_chunk = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                part.query, part.key, part.value, 0.0, False, attn_mask=part.mask
            )
            part.put(out, chunk, attended)
            lse.append(lse_of_chunk)
        ctx.save_for_backward(query, *keys, out, *lse)
        ctx.blocks, ctx.window, ctx.chunks = blocks, window, chunks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, *rest = ctx.saved_tensors
        keys, out, lse = ContextKeys(*rest[:4]), rest[4], rest[5:]
        grad_query = torch.empty_like(query)
        # In float32 at least: many blocks add to the context's gradients.
        grads = ContextKeys(*(torch.zeros_like(x, dtype=sum_dtype(x)) for x in keys))
        for chunk, lse_of_chunk in zip(ctx.chunks, lse, strict=True):
            part = _ChunkInputs.take(query, keys, chunk, ctx.blocks, ctx.window)
            query_grad, key_grad, value_grad = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                part.join(grad, chunk), part.query, part.key, part.value, part.join(out, chunk), lse_of_chunk, 0.0, False,
                attn_mask=part.mask,
            )  # fmt: skip
            part.put(grad_query, chunk, query_grad)
            part.add(grads.context_key, grads.block_key, chunk, key_grad)
            part.add(grads.context_value, grads.block_value, chunk, value_grad)
        return grad_query, *(grad.to(x.dtype) for grad, x in zip(grads, keys, strict=True)), None, None


def _chunks(blocks: Blocks, window: int | None) -> list[_Chunk]:
    samples, anchors = list(zip(blocks.row.tolist(), blocks.start.tolist(), strict=True)), blocks.anchor.tolist()
    chunks, start = [], 0
    for stop in range(1, len(samples) + 1):
        if stop == len(samples) or samples[stop] != samples[start] or stop - start == CHUNK_BLOCKS:
            nearest, last = min(anchors[start:stop]), max(anchors[start:stop])
            row, first = samples[start]
            if window is not None:
                first = max(first, nearest - (window - 1))
            chunks.append(_Chunk(start, stop, row, first, last))
            start = stop
    return chunks


class _ChunkInputs(NamedTuple):
    """One chunk as a batch of one: query [1, heads, n·B, D], key and value [1, kv_heads, context + n·B, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    @classmethod
    def take(cls, query: Tensor, keys: ContextKeys, chunk: _Chunk, blocks: Blocks, window: int | None) -> "_ChunkInputs":
        context = slice(chunk.first, chunk.last)
        key, value = (
            torch.cat((of_context[chunk.row, None, :, context], cls.join(of_block, chunk)), dim=2)
            for of_context, of_block in ((keys.context_key, keys.block_key), (keys.context_value, keys.block_value))
        )
        mask = _chunk_mask(chunk, blocks.anchor, query, window)
        return cls(cls.join(query, chunk), key, value, mask)

    @staticmethod
    def join(x: Tensor, chunk: _Chunk) -> Tensor:
        """[M, heads, B, D] → [1, heads, n·B, D]."""
        return x[chunk.start : chunk.stop].transpose(0, 1).flatten(1, 2).unsqueeze(0)

    @staticmethod
    def put(out: Tensor, chunk: _Chunk, joined: Tensor) -> None:
        """Write [1, heads, n·B, D] to the chunk's blocks of [M, heads, B, D]."""
        out[chunk.start : chunk.stop] = joined[0].unflatten(1, (-1, out.shape[2])).transpose(0, 1)

    @classmethod
    def add(cls, context: Tensor, block: Tensor, chunk: _Chunk, grad: Tensor) -> None:
        """Spread the gradient of `key` or `value` over context and blocks."""
        context[chunk.row, :, chunk.first : chunk.last] += grad[0, :, : chunk.last - chunk.first]
        cls.put(block, chunk, grad[:, :, chunk.last - chunk.first :])


def _chunk_mask(chunk: _Chunk, anchor: Tensor, like: Tensor, window: int | None) -> Tensor | None:
    """What a chunk adds to its scores, [n·B, context + n·B]; None where everything is seen."""
    num_blocks, block_size = chunk.stop - chunk.start, like.shape[2]
    if num_blocks == 1 and window is None:
        return None
    anchor = anchor[chunk.start : chunk.stop]
    block_position = (anchor[:, None] + torch.arange(block_size)).flatten()
    context = torch.arange(chunk.first, chunk.last)
    own = torch.arange(num_blocks).repeat_interleave(block_size)
    seen = torch.cat((context < anchor[own, None], own[:, None] == own), dim=1)
    if window is not None:
        seen &= _within(block_position[:, None], torch.cat((context, block_position)), window)
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))


def _flex_block_attention(query: Tensor, keys: ContextKeys, blocks: Blocks, window: int | None) -> Tensor:
    """The same with flex attention over all samples and blocks laid end to end. Its mask skips what no query sees."""
    batch, _, length, _ = keys.context_key.shape
    mask = flex_block_mask(blocks, (batch, length), query.shape[2], window)
    key = torch.cat((_end_to_end(keys.context_key), _end_to_end(keys.block_key)), dim=2)
    value = torch.cat((_end_to_end(keys.context_value), _end_to_end(keys.block_value)), dim=2)
    out = flex(_end_to_end(query), key, value, mask)
    return out[0].unflatten(1, (-1, query.shape[2])).transpose(0, 1)


def flex_block_mask(blocks: Blocks, context_shape: tuple[int, int], block_size: int, window: int | None) -> Any:
    """Flex attention's mask of [M·B, batch·S + M·B], in tiles; context_shape is (batch, S)."""
    length = context_shape[1]
    num_context, num_queries = context_shape[0] * length, len(blocks.anchor) * block_size
    row, start, anchor = blocks.row, blocks.start, blocks.anchor

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        # Negative, and unused, where `key` is of the context. Inductor cannot compile a clamp before // and %.
        block_key = key - num_context
        of_context = (key // length == row[block]) & (key % length >= start[block]) & (key % length < anchor[block])
        seen = torch.where(key < num_context, of_context, block_key // block_size == block)
        if window is None:
            return seen
        position = anchor[block] + query % block_size
        key_position = torch.where(key < num_context, key % length, anchor[block] + block_key % block_size)
        return seen & _within(position, key_position, window)

    return flex_mask(visible, None, num_queries, num_context + num_queries, anchor.device)


def _end_to_end(x: Tensor) -> Tensor:
    """[N, heads, length, D] → [1, heads, N·length, D]."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
