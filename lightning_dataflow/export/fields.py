"""The fields of a published draft's configuration, checked. What our networks cannot express is refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.speculators import DRAFT_TOKENS
from lightning_dataflow.export.vllm import LAYER_IDS
from lightning_dataflow.strategies.blocks.network import FULL, SLIDING

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "bias": (False,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "partial_rotary_factor": (1.0,),
    "is_neox_style": (True,),
    "rope_is_neox_style": (True,),
    "use_gemma_norm": (False,),
    "quantization_config": (),
    "logit_scale": (1.0,),
}
_EAGLE3_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "norm_before_fc": (False,),
    "norm_before_residual": (False,),
    "fc_norm": (False,),
    "use_aux_norm": (False,),
    "norm_output": (False,),
    "use_aux_hidden_state": (True,),
    "parallel_drafting": (False,),
}
_BLOCK_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_swa": (False,),
    "conv_kernel_size": (0,),
    "selector_rank": (0,),
    "output_multiplier": (1.0,),
    "final_logit_softcapping": (0.0,),
    "attention_sink_bias": (False,),
    "attention_value_scale": (),
    "sample_from_anchor": (False,),
}
_DEFAULT_ROPE: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1.0,),
}


class Fields:
    """A plain configuration with layer ids counted our way.

    Args:
        path: named in errors.

    Raises:
        UserError: a field asks for another network than ours. The message names it.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        self.values = values
        self._own = {key: values.get(key) or {} for key in ("eagle_config", "dflash_config")}
        if not all(isinstance(one, dict) for one in self._own.values()):
            raise UserError(f"{path}: eagle_config and dflash_config must be objects")
        self._refuse(_NEUTRAL)

    def own(self, name: str, default: Any = None) -> Any:
        """A field of `dflash_config` or `eagle_config`, else the top-level one."""
        for place in (*self._own.values(), self.values):
            if place.get(name) is not None:
                return place[name]
        return default

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A field that is a size."""
        value = self.own(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{self.path}: {name}={value!r} is no size")
        return value

    def eagle3(self) -> tuple[dict[str, Any], tuple[int, ...] | None]:
        """Sizes of an EAGLE3 draft, and its layer ids."""
        self._refuse(_EAGLE3_NEUTRAL)
        if self.count("num_hidden_layers", 1) != 1:
            raise UserError(f"{self.path}: num_hidden_layers={self.count('num_hidden_layers')}, EAGLE3 here has one layer")
        sizes = self._layers() | {"draft_vocab_size": self.count("draft_vocab_size", self.count("vocab_size"))}
        return sizes, self._ids(LAYER_IDS)

    def block(self, *, domino: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Sizes of a DFlash or Domino draft, and its layer ids."""
        self._refuse(_BLOCK_NEUTRAL)
        if self.values.get("draft_vocab_size") not in (None, self.count("vocab_size")):
            raise UserError(
                f"{self.path}: draft_vocab_size={self.values['draft_vocab_size']}, DFlash here uses the target's"
            )
        num_layers = self.count("num_hidden_layers")
        types = self.values.get("layer_types") or [FULL] * num_layers
        if not isinstance(types, list):
            raise UserError(f"{self.path}: layer_types={types!r} is no list")
        windowed = SLIDING in types
        for name in ("is_causal", "causal"):
            causal = self.own(name)
            if causal is not None and (bool(causal) != windowed or len(set(types)) > 1):
                raise UserError(f"{self.path}: {name}={causal} with layer_types={types} is another attention than ours")
        sizes = self._layers() | {
            "num_layers": num_layers,
            "block_size": self.count("block_size", 16),
            "mask_token_id": self.count("mask_token_id", least=0),
            "layer_types": types if windowed else [],
            "sliding_window": self._window() if windowed else None,
        }
        if domino:
            sizes |= {name: self.count(name) for name in ("gru_hidden_dim", "emb_dim")}
            sizes["pure_draft_prefix_len"] = self.count("pure_draft_prefix_len", least=0)
            sizes["shift_label"] = bool(self.own("shift_label"))
        ids = self._ids("target_layer_ids")
        if ids is None:
            raise UserError(f"{self.path} does not say which layers of the target the draft reads (target_layer_ids)")
        return sizes, ids

    def num_draft_tokens(self) -> int | None:
        """How many tokens it is to draft at a time, if the folder says so."""
        return None if self.own(DRAFT_TOKENS) is None else self.count(DRAFT_TOKENS)

    def num_target_layers(self) -> int | None:
        """Of the target, if the folder says so."""
        return None if self.own("num_target_layers") is None else self.count("num_target_layers")

    def _layers(self) -> dict[str, Any]:
        heads = self.count("num_attention_heads")
        return {
            "intermediate_size": self.count("intermediate_size"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.count("num_key_value_heads", heads),
            "head_dim": self.count("head_dim", self.count("hidden_size") // heads),
            "rms_norm_eps": self._real("rms_norm_eps", self.values.get("rms_norm_eps", 1e-6)),
            "rope_theta": self._rope_theta(),
        }

    def _rope_theta(self) -> float:
        theta = self.values.get("rope_theta", 10000.0)
        for name in ("rope_scaling", "rope_parameters"):  # older transformers' name, and today's
            rope = self.values.get(name) or {}
            if not isinstance(rope, dict):
                raise UserError(f"{self.path}: {name}={rope!r} is no object")
            for field, value in rope.items():
                if value is None:
                    continue
                if field == "rope_theta":
                    theta = value
                elif value not in _DEFAULT_ROPE.get(field, ()):
                    raise UserError(
                        f"{self.path}: {name} has {field}={value!r}: only default rotary embeddings of all of a head, the "
                        "same in all layers, are supported"
                    )
        return self._real("rope_theta", theta)

    def _window(self) -> int:
        """vLLM reads a `swa_window_size` before `sliding_window`, SGLang the latter alone."""
        window = self.own("swa_window_size")
        other = self.own("sliding_window", window)
        if window is not None and other != window:
            raise UserError(
                f"{self.path}: swa_window_size={window} with sliding_window={other}: engines differ in which they take, "
                "leave the one that it was trained with"
            )
        return self.count("sliding_window" if window is None else "swa_window_size")

    def _ids(self, name: str) -> tuple[int, ...] | None:
        ids = self.own(name)
        if not ids:
            return None
        if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
            raise UserError(f"{self.path}: {name}={ids!r} is no list of layers")
        return tuple(ids)

    def _real(self, name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{self.path}: {name}={value!r} is no number")
        return float(value)

    def _refuse(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        for name, allowed in neutral.items():
            value = self.own(name)
            if value is not None and value not in allowed:
                raise UserError(
                    f"{self.path}: {name}={value} is another network than is trained here, so it cannot start one"
                )
