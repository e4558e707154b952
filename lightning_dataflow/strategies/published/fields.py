"""The fields of a published draft's configuration, checked. What our networks cannot express is refused by name."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.targets.rope import SCALING_FIELDS, Rope, scaling_of
from lightning_dataflow.targets.sizes import check_count, check_eps, check_theta

DRAFT_TOKENS = "speculative_tokens"

Allowed = Mapping[str, tuple[Any, ...]]
SUPPORTED: Allowed = {
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
_DEFAULT_ROPE: Allowed = {"partial_rotary_factor": (1.0,)}


class Fields:
    """The fields of a `config.json`.

    Args:
        path: named in errors.
        section: field that holds the algorithm's own fields.

    Raises:
        UserError: a field asks for another network than ours. The message names it.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], section: str = ""):
        self.path = path
        self.values = values
        self._section = values.get(section) or {}
        if not isinstance(self._section, dict):
            raise UserError(f"{path}: {section} must be an object")

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the algorithm's section, else the top-level one, else `default`."""
        for values in (self._section, self.values):
            if values.get(name) is not None:
                return values[name]
        return default

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A field that is a size."""
        return check_count(self.get(name, default), name, self.path, least=least)

    def optional_count(self, name: str) -> int | None:
        """The same, None if the folder does not say."""
        return None if self.get(name) is None else self.count(name)

    def layer_ids(self, name: str, offset: int = 0) -> tuple[int, ...] | None:
        """A list of target layers, counted our way; None if the folder does not say."""
        ids = self.get(name)
        if not ids:
            return None
        if not isinstance(ids, list) or not all(type(layer) is int and layer >= offset for layer in ids):
            raise UserError(f"{self.path}: {name}={ids!r} is no list of layers")
        return tuple(layer - offset for layer in ids)

    def refuse_others(self, allowed: Allowed, **absent: Any) -> None:
        """Raise UserError if a field has a value that is not allowed. `absent`: values that missing fields stand for."""
        for name, values in allowed.items():
            value = self.get(name, absent.get(name))
            if value is not None and value not in values:
                raise UserError(
                    f"{self.path}: {name}={value} is another network than is trained here, so it cannot start one"
                )

    def decoder_sizes(self) -> dict[str, Any]:
        """Sizes of Llama-like decoder layers."""
        heads = self.count("num_attention_heads")
        return {
            "intermediate_size": self.count("intermediate_size"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.count("num_key_value_heads", heads),
            "head_dim": self.count("head_dim", self.count("hidden_size") // heads),
            "rms_norm_eps": check_eps(self.values.get("rms_norm_eps", 1e-6), self.path),
            **self._rope(),
        }

    def _rope(self) -> dict[str, Any]:
        """Base and scaling of the rotary embedding."""
        theta, scaling = self.values.get("rope_theta", 10000.0), None
        for name in ("rope_scaling", "rope_parameters"):  # older transformers' name, and today's
            rope = self.values.get(name) or {}
            if not isinstance(rope, dict):
                raise UserError(f"{self.path}: {name}={rope!r} is no object")
            given = {field: value for field, value in rope.items() if value is not None}
            theta = given.pop("rope_theta", theta)
            scaling = self._scaling(name, given) or scaling
        return {"rope_theta": check_theta(theta, self.path), "rope_scaling": scaling}

    def _scaling(self, name: str, given: dict[str, Any]) -> Rope | None:
        scaling = scaling_of(given, self.optional_count("max_position_embeddings"))
        known = SCALING_FIELDS.get(scaling["rope_type"], {}) if scaling else {}
        for field, value in given.items():
            if field in ("rope_type", "type"):
                wrong = value != (scaling or {}).get("rope_type", "default")
            elif field in known:
                wrong = not isinstance(value, int | float) or not 0 < value < math.inf
            else:
                wrong = value not in _DEFAULT_ROPE.get(field, ())
            if wrong:
                raise UserError(
                    f"{self.path}: {name} has {field}={value!r}: only default rotary embeddings of all of a head, the "
                    f"same in all layers, and {', '.join(SCALING_FIELDS)} with all of their fields are supported"
                )
        return scaling
