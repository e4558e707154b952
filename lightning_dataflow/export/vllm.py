"""vLLM's own folders (read in 0.32.0)."""

import json
from collections.abc import Mapping
from shlex import quote
from typing import Any

from lightning_dataflow.export.base import Config, DraftFormat, DraftSpec, block_fields, eagle3_fields

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def states_after(layer_ids: tuple[int, ...]) -> list[int]:
    """Our ids as vLLM counts EAGLE3's: k is the residual stream after k layers."""
    return [layer + 1 for layer in layer_ids]


def layers_before(ids: Any) -> list[int]:
    """The other way round."""
    return [int(one) - 1 for one in ids]


class VLLMFormat(DraftFormat):
    """EAGLE3's layer ids are ours + 1, in both places where its two model runners look; DFlash's are ours."""

    name = "vllm"
    title = "vLLM"
    strategies = ("eagle3", "dflash")

    def config(self, draft: DraftSpec, dtype: str) -> Config:
        """See DraftFormat."""
        if draft.strategy != "eagle3":
            return block_fields(draft) | {"dtype": dtype}
        ids = states_after(draft.layer_ids)
        return eagle3_fields(draft, ids) | {LAYER_IDS: ids, "norm_before_residual": False, "dtype": dtype}

    def serve_command(self, draft: DraftSpec, folder: str) -> str:
        """See DraftFormat."""
        speculative = {"method": draft.strategy, "model": folder, "num_speculative_tokens": draft.num_draft_tokens}
        return f"vllm serve {quote(draft.target)} --speculative-config {quote(json.dumps(speculative))}"

    def plain(self, config: Mapping[str, Any]) -> Config:
        """See DraftFormat."""
        fields = dict(config)
        eagle = dict(fields.get("eagle_config") or {})
        ids = fields.pop(LAYER_IDS, None) or eagle.get(LAYER_IDS)
        if ids and not fields.get("dflash_config"):
            fields["eagle_config"] = eagle | {LAYER_IDS: layers_before(ids)}
        return fields
