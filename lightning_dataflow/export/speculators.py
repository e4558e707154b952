"""The speculators format, which vLLM serves without further options (read in vLLM 0.32.0)."""

from collections.abc import Mapping
from shlex import quote
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.base import Config, DraftFormat, DraftSpec, layer_fields
from lightning_dataflow.export.vllm import LAYER_IDS, layers_before, states_after
from lightning_dataflow.strategies.blocks.network import SLIDING, BlockConfig
from lightning_dataflow.strategies.eagle3.network import Eagle3Config

MODEL_TYPE = "speculators_model_type"
DRAFT_TOKENS = "speculative_tokens"
_BLOCK_LAYER_IDS = "aux_hidden_state_layer_ids"


class SpeculatorsFormat(DraftFormat):
    """The target is named in the folder; layer ids, also DFlash's, are ours + 1."""

    name = "speculators"
    title = "vLLM's speculators format"
    strategies = ("eagle3", "dflash")

    def check(self, draft: DraftSpec) -> None:
        """See DraftFormat."""
        super().check(draft)
        if isinstance(draft.network, BlockConfig) and len(set(draft.network.layer_types)) > 1:
            raise UserError(
                f"the speculators format has one causality for all layers, this draft has layer_types="
                f"{list(draft.network.layer_types)}: export with --format plain, which vLLM serves on its V2 model runner, "
                "so on a GPU"
            )

    def config(self, draft: DraftSpec, dtype: str) -> Config:
        """See DraftFormat."""
        network = draft.network
        layers = layer_fields(draft)
        vocab_size = network.draft_vocab_size if isinstance(network, Eagle3Config) else network.vocab_size
        fields: Config = {
            MODEL_TYPE: draft.strategy,
            "speculators_config": {
                "algorithm": draft.strategy,
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", DRAFT_TOKENS: draft.num_draft_tokens}],
                "verifier": {"name_or_path": draft.target, "architectures": list(draft.target_architectures)},
            },
            "transformer_layer_config": layers,
            "draft_vocab_size": vocab_size,
            "target_hidden_size": network.hidden_size,
            "tie_word_embeddings": False,
            "dtype": dtype,
        }
        ids = states_after(draft.layer_ids)
        if isinstance(network, Eagle3Config):
            layers["num_aux_hidden_states"] = network.num_aux_layers  # else vLLM takes 3: it passes these fields on alone
            own = {"architectures": ["Eagle3DraftModel"], LAYER_IDS: ids}
            return own | fields | {"norm_before_residual": False, "norm_before_fc": False}
        return {"architectures": ["DFlashDraftModel"]} | fields | {
            _BLOCK_LAYER_IDS: ids,
            "block_size": network.block_size,
            "mask_token_id": network.mask_token_id,
            "num_target_layers": draft.num_target_layers,
            "sample_from_anchor": False,
            "sliding_window_non_causal": SLIDING not in network.layer_types,
        }  # fmt: skip

    def serve_command(self, draft: DraftSpec, folder: str) -> str:
        """See DraftFormat."""
        return f"vllm serve {quote(folder)}"

    def tensor_name(self, name: str) -> str:
        """See DraftFormat."""
        return name.replace("midlayer.", "layers.0.")

    def plain(self, config: Mapping[str, Any]) -> Config:
        """See DraftFormat."""
        layers = config.get("transformer_layer_config")
        fields = {**(layers if isinstance(layers, dict) else {}), **config, DRAFT_TOKENS: _draft_tokens(config)}
        if config[MODEL_TYPE] == "eagle3":
            fields.setdefault("norm_before_residual", True)  # what is not said
            ids = layers_before(config.get(LAYER_IDS) or ())
            return fields | {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": {LAYER_IDS: ids}}
        if config[MODEL_TYPE] != "dflash":
            raise UserError(f"drafts of {MODEL_TYPE}={config[MODEL_TYPE]} cannot be read, only eagle3 and dflash")
        sliding = SLIDING in (fields.get("layer_types") or ())
        if sliding == bool(config.get("sliding_window_non_causal", True)):
            raise UserError(
                f"sliding_window_non_causal={config.get('sliding_window_non_causal')} with layer_types="
                f"{fields.get('layer_types')}: the layers of this draft see their block otherwise than ours do"
            )
        ids = layers_before(config.get(_BLOCK_LAYER_IDS) or ())
        return fields | {"architectures": ["DFlashDraftModel"], "dflash_config": {"target_layer_ids": ids}}


def _draft_tokens(config: Mapping[str, Any]) -> Any:
    """Of the first proposal method, the one that vLLM takes; None where there is none."""
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return methods[0].get(DRAFT_TOKENS)
