"""Several sequences that the target decodes together."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_dataflow.contracts import UserError
from lightning_dataflow.targets.hf import HFTargetEngine, TargetSession


class TargetBatch:
    """Sequences of different lengths, each with its own keys and values at its own positions.

    `extend` reads the same number of tokens for every row in one forward pass. A row sees its own tokens only, so the
    numbers are those of a batch of one up to the rounding of matrix kernels.

    Args:
        target: with capture layers set, whose states are returned.
        prompts: token ids of each row, read one by one.
        room: tokens to reserve place for behind each prompt.

    Attributes:
        logits: of each row's last prompt token, float32 [V].
        aux: aux hidden states [S, n_layers·H] of each prompt.
        lengths: tokens of each row so far.

    Raises:
        UserError: several rows, and the target takes no positions or keeps more than keys and values of full attention.
    """

    def __init__(self, target: HFTargetEngine, prompts: Sequence[Sequence[int]], room: int):
        if len(prompts) > 1 and "position_ids" not in inspect.signature(target.model.forward).parameters:
            raise UserError(
                f"several sequences at a time need positions of their own, which a {type(target.model).__name__} does not "
                "take: set evaluate.batch_size=1"
            )
        self.target = target
        self.logits: list[Tensor] = []
        self.aux: list[Tensor] = []
        self.lengths = [len(prompt) for prompt in prompts]
        sessions = []
        for prompt in prompts:
            session = TargetSession(target)
            logits, aux = session.extend(prompt)
            session.crop(len(prompt))
            self.logits.append(logits[-1])
            self.aux.append(aux)
            sessions.append(session)
        self._single = sessions[0] if len(sessions) == 1 else None
        caches = [] if self._single else [session.cache for session in sessions]
        self._layers = _stack(caches, max(self.lengths) + room)

    def extend(self, token_ids: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Read n more tokens of every row. Returns each one's logits [n, V], in float32, and aux states [n, n_layers·H]."""
        states = [self._single.extend(token_ids[0])] if self._single else self._extend_rows(token_ids)
        self.lengths = [length + len(ids) for length, ids in zip(self.lengths, token_ids, strict=True)]
        return states

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget each row's tokens from its length on; follows every `extend`."""
        self.lengths = list(lengths)
        if self._single is not None:
            self._single.crop(lengths[0])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        if len(rows) == len(self.lengths):
            return
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self._layers:
            layer.keep(rows)

    @torch.no_grad()
    def _extend_rows(self, token_ids: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        device = self.target.device
        ids = torch.tensor([list(row) for row in token_ids], device=device)
        positions = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(ids.shape[1], device=device)
        total = max(self.lengths) + ids.shape[1]
        for layer in self._layers:
            layer.place(positions, total)
        visible = torch.arange(total, device=device) <= positions[:, None, :, None]
        if self.target.model.config._attn_implementation == "eager":  # it adds the mask, whatever its dtype
            dtype = self.target.model.dtype
            visible = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        with self.target.recorded() as states:
            output = self.target.model(
                input_ids=ids,
                attention_mask=visible,
                position_ids=positions,
                past_key_values=Cache(layers=list(self._layers)),
                use_cache=True,
            )
        aux = torch.cat([states[layer] for layer in self.target.layer_ids], dim=-1)
        return list(zip(output.logits.float(), aux, strict=True))


class _Rows(DynamicLayer):
    """Keys and values [rows, kv_heads, capacity, head_dim] of one layer, written at each row's own positions."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def place(self, positions: Tensor, total: int) -> None:
        """Set where the next tokens go, [rows, n], and how much of the buffers is in use with them."""
        self._rows = torch.arange(len(positions), device=positions.device)[:, None]
        self._positions, self._total = positions, total

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.keys, self.values = self.keys[list(rows)], self.values[list(rows)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[self._rows, :, self._positions] = new.transpose(1, 2)
        return self.keys[:, :, : self._total], self.values[:, :, : self._total]


def _stack(caches: Sequence[DynamicCache], capacity: int) -> list[_Rows]:
    rows = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        if any(type(layer) is not DynamicLayer for layer in layers):
            raise UserError(
                f"several sequences at a time need full attention, and this target has a {type(layers[0]).__name__}: set "
                "evaluate.batch_size=1"
            )
        keys, values = (
            torch.cat([pad(tensor, (0, 0, 0, capacity - tensor.shape[2])) for tensor in tensors])
            for tensors in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        rows.append(_Rows(keys, values))
    return rows
