"""DFlash's folders for SGLang and vLLM."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.blocks.network import FULL, SLIDING
from lightning_dataflow.strategies.published.contract import (
    Config,
    DraftDescription,
    DraftExport,
)
from lightning_dataflow.strategies.published.engines import SPECULATORS, Engine
from lightning_dataflow.strategies.published.fields import Allowed, Fields

_SPECULATORS_LAYER_IDS = "aux_hidden_state_layer_ids"
_CPU_CAVEAT = (
    "on a CPU, vLLM 0.32 normalises the context's keys in all layers of a DFlash draft with the first layer's weights: a "
    "draft of several layers is accepted less than on a GPU or with backend hf"
)


class DFlashExport(DraftExport):
    """Both engines count the layers of plain folders our way."""

    served_as: ClassVar[Mapping[str, str]] = {"sglang": "DFLASH", "vllm": "dflash", "speculators": "dflash"}
    architectures = ("DFlashDraftModel",)
    section = "dflash_config"
    supported: ClassVar[Allowed] = {
        "projector_type": (),
        "use_swa": (False,),
        "conv_kernel_size": (0,),
        "selector_rank": (0,),
        "output_multiplier": (1.0,),
        "final_logit_softcapping": (0.0,),
        "attention_sink_bias": (False,),
        "attention_value_scale": (),
        "sample_from_anchor": (False,),
    }

    def check(self, draft: DraftDescription, engine: Engine) -> None:
        if draft.head_bias:
            raise UserError(
                f"the head of {draft.target} has a bias, which {engine.title} leaves out of the logits of a "
                f"{draft.strategy} draft: train a strategy whose drafts have a head of their own"
            )
        if engine is SPECULATORS and len(set(draft.network.layer_types)) > 1:
            raise UserError(
                f"the speculators format has one causality for all layers, this draft has layer_types="
                f"{list(draft.network.layer_types)}: export with --format plain, which vLLM serves on its V2 model runner, "
                "so on a GPU"
            )

    def fields(self, draft: DraftDescription, engine: Engine) -> Config:
        network, layers = draft.network, self._layer_fields(draft)
        if engine is SPECULATORS:
            common = self.speculators_fields(draft, layers, network.vocab_size)
            return {
                "architectures": [self.architectures[0]],
                **common,
                _SPECULATORS_LAYER_IDS: engine.to_engine_ids(draft.layer_ids),
                "block_size": network.block_size,
                "mask_token_id": network.mask_token_id,
                "num_target_layers": draft.num_target_layers,
                "sample_from_anchor": False,
                "sliding_window_non_causal": SLIDING not in network.layer_types,
            }
        own = {
            "block_size": network.block_size,
            "num_target_layers": draft.num_target_layers,
            "target_layer_ids": list(draft.layer_ids),
            "mask_token_id": network.mask_token_id,
            **self.head_fields(network),
        }
        return {"architectures": [self.architectures[0]], **layers, self.section: own}

    def _layer_fields(self, draft: DraftDescription) -> Config:
        """As in transformers' Qwen3Config."""
        network = draft.network
        layer_types = list(network.layer_types) or [FULL] * network.num_layers
        return self.decoder_fields(draft) | {
            "model_type": "qwen3",
            "num_hidden_layers": network.num_layers,
            "layer_types": layer_types,
            "use_sliding_window": SLIDING in layer_types,
            "sliding_window": network.sliding_window,
            "max_window_layers": 0 if SLIDING in layer_types else network.num_layers,
        }

    def head_fields(self, network: Any) -> Config:
        """Fields of what the draft has beside the network that block drafts share."""
        return {}

    def read(self, fields: Fields, engine: Engine) -> tuple[dict[str, Any], tuple[int, ...] | None]:
        fields.refuse_others(self.supported)
        if fields.values.get("draft_vocab_size") not in (None, fields.count("vocab_size")):
            raise UserError(
                f"{fields.path}: draft_vocab_size={fields.values['draft_vocab_size']}, a block draft here uses the target's"
            )
        num_layers = fields.count("num_hidden_layers")
        types = fields.values.get("layer_types") or [FULL] * num_layers
        if not isinstance(types, list):
            raise UserError(f"{fields.path}: layer_types={types!r} is no list")
        _check_causality(fields, engine, types)
        sizes = fields.decoder_sizes() | {
            "num_layers": num_layers,
            "block_size": fields.count("block_size", 16),
            "mask_token_id": fields.count("mask_token_id", least=0),
            "layer_types": types if SLIDING in types else [],
            "sliding_window": _window(fields) if SLIDING in types else None,
        }
        in_speculators = engine is SPECULATORS
        ids = fields.layer_ids(_SPECULATORS_LAYER_IDS, engine.layer_offset) if in_speculators else None
        ids = ids or fields.layer_ids("target_layer_ids")
        if ids is None:
            raise UserError(f"{fields.path} does not say which layers of the target the draft reads (target_layer_ids)")
        return sizes, ids

    def cpu_caveat(self, sizes: Mapping[str, Any]) -> str | None:
        return _CPU_CAVEAT if sizes["num_layers"] > 1 else None

    def card_rows(self, network: Any) -> dict[str, object]:
        rows = {"layers": network.num_layers, "block size": network.block_size, "mask token": network.mask_token_id}
        window = {} if network.sliding_window is None else {"sliding window": network.sliding_window}
        return self.decoder_rows(network) | rows | window


def _check_causality(fields: Fields, engine: Engine, types: list[str]) -> None:
    """Raise UserError unless sliding layers are causal inside their block, and the others are not."""
    windowed = SLIDING in types
    for name in ("is_causal", "causal"):
        causal = fields.get(name)
        if causal is not None and (bool(causal) != windowed or len(set(types)) > 1):
            raise UserError(f"{fields.path}: {name}={causal} with layer_types={types} is another attention than ours")
    if engine is SPECULATORS and windowed == bool(fields.get("sliding_window_non_causal", True)):
        raise UserError(
            f"{fields.path}: sliding_window_non_causal={fields.get('sliding_window_non_causal')} with layer_types={types}: "
            "the layers of this draft see their block otherwise than ours do"
        )


def _window(fields: Fields) -> int:
    """vLLM reads `swa_window_size` before `sliding_window`, SGLang the latter alone."""
    window = fields.get("swa_window_size")
    other = fields.get("sliding_window", window)
    if window is not None and other != window:
        raise UserError(
            f"{fields.path}: swa_window_size={window} with sliding_window={other}: engines differ in which they take, "
            "leave the one that it was trained with"
        )
    return fields.count("sliding_window" if window is None else "swa_window_size")
