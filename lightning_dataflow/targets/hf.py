"""Target engine `hf`: any transformers causal language model, in this process."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from lightning_dataflow.contracts import UserError
from lightning_dataflow.stores.base import dtype_name
from lightning_dataflow.targets.base import HIDDEN_STATES, TargetEngine
from lightning_dataflow.targets.hardware import default_device, multiplies_bfloat16
from lightning_dataflow.targets.info import auto_class, loading, read_eos_token_ids, read_target_info, reason

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


class HFTargetEngine(TargetEngine):
    """Runs the target with transformers and records its residual stream with forward hooks.

    Args:
        path: a Hugging Face folder.
        layer_ids: layers to capture; see TargetEngine.
        features: what `capture` returns.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's, but float32 where the hardware only
            emulates bfloat16. Features have this dtype.
        device: `auto` (this rank's GPU when there is one), or a torch device.
        attention: transformers' `attn_implementation`; `eager` where the architecture does not support it.

    Attributes:
        eos_token_ids: tokens that end a generation.
    """

    backend = "hf"

    def __init__(
        self,
        path: str | Path,
        *,
        layer_ids: Sequence[int] | None = None,
        features: Sequence[str] = HIDDEN_STATES,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "sdpa",
    ):
        if dtype not in DTYPES:
            raise UserError(f"target.dtype={dtype} is unknown: use {', '.join(DTYPES)}")
        self.info = read_target_info(path)
        self.device = default_device() if device == "auto" else torch.device(device)
        model = _load(path, dtype, attention)
        if dtype == "auto" and model.dtype == torch.bfloat16 and not multiplies_bfloat16(self.device):
            model = model.float()
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]
        self.model.requires_grad_(False)
        self.dtype = dtype_name(self.model.dtype)
        self.eos_token_ids = read_eos_token_ids(path)
        self._decoder = model.get_decoder()
        self._layers = decoder_layers(self._decoder, self.info.num_layers)
        self.features = tuple(features)
        if layer_ids is not None:
            self.set_capture_layers(layer_ids)

    @torch.no_grad()
    def capture(self, batch: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
        """Run one forward pass. An autocast context around it has no effect."""
        assert self.layer_ids, "set_capture_layers comes first"
        lengths = [len(ids) for ids in batch]
        input_ids = pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True)
        attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        with torch.autocast(self.device.type, enabled=False), self.recorded() as states:
            last = self._decoder(
                input_ids=input_ids.to(self.device),
                attention_mask=attention_mask.to(self.device) if min(lengths) < max(lengths) else None,
                use_cache=False,
            ).last_hidden_state
        captured = {"aux_hidden_states": torch.cat([states[layer] for layer in self.layer_ids], dim=-1)}
        captured["last_hidden_state"] = last
        on_cpu = {name: captured[name].cpu() for name in self.features}
        return [{name: rows[row, :length] for name, rows in on_cpu.items()} for row, length in enumerate(lengths)]

    @torch.no_grad()
    def logits_of(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The last hidden state [S, H] of one sequence, as `capture` returns it, and the target's own logits [S, V]."""
        ids = torch.tensor([list(token_ids)], device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            last = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
            return last[0], self.model(input_ids=ids, use_cache=False).logits[0]

    @contextmanager
    def recorded(self) -> Iterator[dict[int, torch.Tensor]]:
        """A dict that a forward pass fills with the output [B, S, H] of every capture layer."""
        states: dict[int, torch.Tensor] = {}

        def record(layer: int) -> Any:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                states[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self._layers[layer].register_forward_hook(record(layer)) for layer in self.layer_ids]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()


def _load(path: str | Path, dtype: str, attention: str) -> PreTrainedModel:
    """The model with every weight from its files. Raises UserError where transformers cannot load it."""
    kind = auto_class(path)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "output_loading_info": True,
        **loading(path),
    }
    try:
        try:
            model, loaded = kind.from_pretrained(path, **options)
        except ValueError as error:
            if "attention implementation" not in str(error) or attention == "eager":
                raise
            log.info("%s: its architecture does not support attention=%s, using eager", path, attention)
            model, loaded = kind.from_pretrained(path, **options | {"attn_implementation": "eager"})
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"transformers cannot load {path}: {reason(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"the safetensors of {path} lack {len(missing)} of the model's tensors ({missing[0]} is one), which would be "
            "random: fetch the target again, or correct its config.json"
        )
    return model


def decoder_layers(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of decoder layers: the only ModuleList child with as many modules as the config has layers."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
    if len(lists) != 1:
        raise UserError(f"cannot tell the {num_layers} decoder layers of a {type(decoder).__name__}: not supported by hf")
    return lists[0]


class TargetSession:
    """One sequence being decoded by the target, with its key-value cache.

    Args:
        target: with capture layers set, whose states `extend` returns.
    """

    def __init__(self, target: HFTargetEngine):
        self.target = target
        self.tokens: list[int] = []
        self.cache = self._new_cache()

    @torch.no_grad()
    def extend(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read n more tokens. Returns logits [n, V] in float32 and aux hidden states [n, n_layers·H]."""
        with self.target.recorded() as states:
            output = self._read(token_ids)
        self.tokens += token_ids
        aux = torch.cat([states[layer] for layer in self.target.layer_ids], dim=-1)
        return output.logits[0].float(), aux[0]

    @torch.no_grad()
    def crop(self, length: int) -> None:
        """Forget tokens from `length` on. Recurrent states cannot be taken back: then the target reads the others again."""
        removed = len(self.tokens) - length
        self.tokens = self.tokens[:length]
        if removed and any(_is_recurrent(layer) for layer in self.cache.layers):
            self.cache = self._new_cache()
            self._read(self.tokens)
            removed = 0
        self.cache.crop(-removed)

    def _read(self, token_ids: Sequence[int]) -> Any:
        ids = torch.tensor([list(token_ids)], device=self.target.device)
        return self.target.model(input_ids=ids, past_key_values=self.cache, use_cache=True)

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.target.model.config)
        cache.activate_past_recording()  # a sliding window would drop what `crop` needs again
        return cache


def _is_recurrent(layer: Any) -> bool:
    """Whether a layer of a cache holds a state that sums up all tokens."""
    return any(getattr(layer, "is_recurrent_states_initialized", {}).values())
