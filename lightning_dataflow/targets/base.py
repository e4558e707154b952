"""The contract of every target engine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from lightning_dataflow.contracts import CaptureSpec, UserError
from lightning_dataflow.sglang_plugin.wire import HIDDEN_STATES
from lightning_dataflow.targets.info import TargetInfo


class TargetEngine(ABC):
    """Reads token ids and returns hidden states.

    Layer id i is the output of decoder layer i, counted from 0 (Hugging Face's `hidden_states[i + 1]`). Engines that
    count differently convert.
    """

    backend: ClassVar[str]
    info: TargetInfo
    layer_ids: tuple[int, ...] = ()
    dtype: str
    """Of the features: torch's name, for example `bfloat16`."""
    features: tuple[str, ...] = HIDDEN_STATES
    """What `capture` returns; drafts need not read all of it."""

    def set_capture_layers(self, layer_ids: Sequence[int]) -> None:
        """Capture these layers from now on, in ascending order. Raises UserError for an id that does not exist."""
        self.layer_ids = check_layer_ids(layer_ids, self.info.num_layers)

    @property
    def capture_spec(self) -> CaptureSpec:
        """What `capture` returns, as refs describe it."""
        return CaptureSpec(layer_ids=self.layer_ids, norm="post", hidden_size=self.info.hidden_size)

    @property
    def widths(self) -> dict[str, int]:
        """Last dimension of every captured feature."""
        size = self.info.hidden_size
        widths = {"aux_hidden_states": len(self.layer_ids) * size, "last_hidden_state": size}
        return {name: widths[name] for name in self.features}

    @abstractmethod
    def capture(self, batch: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
        """Read sequences of token ids, of different lengths S.

        Returns `features` for each, on the CPU: `aux_hidden_states` [S, n·H], the n layers concatenated in ascending order,
        and `last_hidden_state` [S, H] after the final norm. Attention is causal and padding follows the tokens, so the
        rest of the batch has no effect, except that matrix kernels may round differently for another shape of the batch.
        """


def check_layer_ids(layer_ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Sorted `layer_ids`; raises UserError when empty, repeated or out of range."""
    ids = tuple(sorted(int(layer) for layer in layer_ids))
    if not ids or len(set(ids)) != len(ids):
        raise UserError(
            f"capture layers {list(layer_ids)} are empty or repeat an id: name each layer once (strategy.layer_ids)"
        )
    if ids[0] < 0 or ids[-1] >= num_layers:
        raise UserError(
            f"capture layers {list(ids)}: the target has {num_layers} layers, ids go from 0 to {num_layers - 1} "
            "(id i is the output of decoder layer i)"
        )
    return ids
