"""Rotary embeddings of targets that were extended to longer texts, as drafts take them over."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Rope = dict[str, Any]

SCALING_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {"factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0},
}
"""Fields, with their defaults, that transformers, SGLang and vLLM read alike. `dynamic` is left out: up to
max_position_embeddings it changes nothing in transformers, but the engines always apply it."""


def read_rope(config: Any) -> tuple[float, Rope | None]:
    """Base and scaling of a target's rotary embedding, those of its full-attention layers if layers differ.

    A draft computes its own keys, so its scaling need not be the target's in every detail, but training and engines must
    agree on it: only the fields that all of them read alike are kept, and kinds that they read differently become none.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if nested := [value for value in parameters.values() if isinstance(value, dict)]:
        parameters = parameters.get("full_attention") or nested[0]
    theta = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    longest, original = getattr(config, "max_position_embeddings", None), parameters.get("original_max_position_embeddings")
    if parameters.get("factor") is None and longest and original:
        parameters = {**parameters, "factor": longest / original}
    return theta, scaling_of(parameters, longest)


def scaling_of(parameters: Mapping[str, Any], longest: int | None) -> Rope | None:
    """The kind of scaling and its fields; None for plain rotary embeddings, and where a field is missing.

    Args:
        longest: the model's max_position_embeddings.
    """
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    fields = SCALING_FIELDS.get(kind)
    if fields is None:
        return None
    fallback = {**fields, "original_max_position_embeddings": longest}
    scaling = {name: fallback[name] if parameters.get(name) is None else parameters[name] for name in fields}
    return None if None in scaling.values() else {"rope_type": kind, **scaling}


@lru_cache(maxsize=16)
def scaled_frequencies(
    head_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...], device: torch.device
) -> tuple[Tensor, float]:
    """Frequencies [head_dim / 2] in float32, and the factor of cosines and sines, as transformers computes them.

    Args:
        scaling: items of a `scaling_of`.
    """
    rope = dict(scaling)
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=int(rope.get("original_max_position_embeddings", 2048) * max(1, rope["factor"])),
        rope_parameters={**rope, "rope_theta": theta},
    )
    with torch.inference_mode(False):  # the cached tensor serves training too
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device)
    return frequencies, float(amplitude)
