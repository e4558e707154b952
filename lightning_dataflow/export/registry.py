"""Formats by engine and name, and by what a folder says of itself."""

from collections.abc import Mapping
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.base import DraftFormat
from lightning_dataflow.export.sglang import SGLangFormat
from lightning_dataflow.export.speculators import MODEL_TYPE, SpeculatorsFormat
from lightning_dataflow.export.vllm import LAYER_IDS, VLLMFormat

MARK = "lightning_dataflow"
"""Key of `config.json` under which our folders name their format."""

_FORMATS: dict[tuple[str, str], DraftFormat] = {
    ("sglang", "plain"): SGLangFormat(),
    ("vllm", "plain"): VLLMFormat(),
    ("vllm", "speculators"): SpeculatorsFormat(),
}


def resolve_format(engine: str, name: str = "plain") -> DraftFormat:
    """The format `name` of an engine. Raises UserError listing what there is."""
    found = _FORMATS.get((engine, name))
    if found is None:
        there = ", ".join(f"{one} {form}" for one, form in _FORMATS)
        raise UserError(f"no format {name!r} for engine {engine!r}: available are {there}")
    return found


def format_of(config: Mapping[str, Any]) -> DraftFormat:
    """The format that a `config.json` is written in.

    EAGLE3 folders of others do not name their engine, and SGLang and vLLM count layers differently: a folder with the field
    that only vLLM reads is taken for vLLM's, any other for SGLang's.
    """
    mark = config.get(MARK)
    if isinstance(mark, dict):
        for one in _FORMATS.values():
            if one.name == mark.get("format"):
                return one
    if MODEL_TYPE in config:
        return resolve_format("vllm", "speculators")
    return resolve_format("vllm" if LAYER_IDS in config else "sglang")
