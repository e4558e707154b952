"""The serving engines, and how each counts the layers of the target and marks its folders."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dataflow.contracts import UserError

MARK = "lightning_dataflow"
"""Key of `config.json` under which our folders name their engine."""
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
MODEL_TYPE = "speculators_model_type"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A serving engine, and one format of a draft's folder that it reads.

    Attributes:
        name: marks our folders, so that they are recognised when they are read back.
        title: for people.
        tested: the release that our folders were tested with.
        layer_offset: added to our layer ids for this engine. Ours are 0 for the output of the first decoder layer; in vLLM
            id k is the residual stream after k layers.
    """

    name: str
    title: str
    tested: str
    layer_offset: int

    def to_engine_ids(self, layer_ids: Iterable[int]) -> list[int]:
        """Our layer ids as the engine counts them."""
        return [layer + self.layer_offset for layer in layer_ids]


SGLANG = Engine(name="sglang", title="SGLang", tested="SGLang 0.5.23", layer_offset=0)
VLLM = Engine(name="vllm", title="vLLM", tested="vLLM 0.32.0", layer_offset=1)
SPECULATORS = Engine(name="speculators", title="vLLM's speculators format", tested="vLLM 0.32.0", layer_offset=1)

_ENGINES = {("sglang", "plain"): SGLANG, ("vllm", "plain"): VLLM, ("vllm", "speculators"): SPECULATORS}


def resolve_engine(engine: str, format: str = "plain") -> Engine:
    """The engine and format of a name. Raises UserError listing the available ones."""
    if (engine, format) not in _ENGINES:
        available = ", ".join(" ".join(names) for names in _ENGINES)
        raise UserError(f"no format {format!r} for engine {engine!r}: available are {available}")
    return _ENGINES[engine, format]


def engine_of(config: Mapping[str, Any]) -> Engine:
    """The engine that a `config.json` is written for.

    Folders of other tools do not name it, and engines count layers differently. A folder with the field that only vLLM
    reads is taken for vLLM's, any other for SGLang's.
    """
    mark = config.get(MARK)
    if isinstance(mark, dict):
        for engine in _ENGINES.values():
            if engine.name == mark.get("format"):
                return engine
    if MODEL_TYPE in config:
        return SPECULATORS
    return VLLM if LAYER_IDS in config else SGLANG
