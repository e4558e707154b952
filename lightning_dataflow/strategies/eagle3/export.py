"""EAGLE3's folders for SGLang and vLLM."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.common.target_tensors import EMBEDDING, HEAD, FrozenTarget, same_tensor
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.strategies.published.contract import (
    Config,
    DraftDescription,
    DraftExport,
    PublishedDraft,
)
from lightning_dataflow.strategies.published.engines import LAYER_IDS, SGLANG, SPECULATORS, Engine
from lightning_dataflow.strategies.published.fields import Allowed, Fields

_SUPPORTED: Allowed = {
    "num_hidden_layers": (1,),
    "norm_before_fc": (False,),
    "norm_before_residual": (False,),
    "fc_norm": (False,),
    "use_aux_norm": (False,),
    "norm_output": (False,),
    "use_aux_hidden_state": (True,),
    "parallel_drafting": (False,),
}
_VOCAB_MAPS = {"d2t", "t2d"}


class Eagle3Export(DraftExport):
    """The draft is one decoder layer, `midlayer` or, in the speculators format, `layers.0`."""

    served_as: ClassVar[Mapping[str, str]] = {"sglang": "EAGLE3", "vllm": "eagle3", "speculators": "eagle3"}
    architectures = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
    section = "eagle_config"
    own_tensor_remedy = "set strategy.train_embeddings=true"

    def check(self, draft: DraftDescription, engine: Engine) -> None:
        if engine is not SGLANG:
            return
        if draft.network.train_embeddings:
            raise UserError(
                "SGLang gives every EAGLE3 draft the target's token embedding, so it does not serve one that was trained "
                "(strategy.train_embeddings=true): export for vllm"
            )
        if len(draft.layer_ids) < 2:
            raise UserError(
                f"SGLang does not serve an EAGLE3 draft of one target layer ({draft.layer_ids[0]}), it leaves out fc: "
                "export for vllm, or train with two or more strategy.layer_ids"
            )

    def fields(self, draft: DraftDescription, engine: Engine) -> Config:
        network, ids = draft.network, engine.to_engine_ids(draft.layer_ids)
        layers = self.decoder_fields(draft) | {"mlp_bias": False}
        if engine is SPECULATORS:
            layers["num_aux_hidden_states"] = network.num_aux_layers  # of these fields alone; vLLM's default is 3
            common = self.speculators_fields(draft, layers, network.draft_vocab_size)
            own = {"architectures": ["Eagle3DraftModel"], LAYER_IDS: ids}
            return own | common | {"norm_before_residual": False, "norm_before_fc": False}
        fields = {
            "architectures": [self.architectures[0]],
            **layers,
            "draft_vocab_size": network.draft_vocab_size,
            "target_hidden_size": network.hidden_size,  # a draft is as wide as its target here
            "num_aux_hidden_states": network.num_aux_layers,
            self.section: {"use_aux_hidden_state": True, LAYER_IDS: ids, "norm_before_fc": False},
        }
        if engine is SGLANG:
            return fields
        return fields | {LAYER_IDS: ids, "norm_before_residual": False}  # vLLM's two model runners look in different places

    def read(self, fields: Fields, engine: Engine) -> tuple[dict[str, Any], tuple[int, ...] | None]:
        fields.refuse_others(_SUPPORTED, norm_before_residual=engine is SPECULATORS)
        vocab_size = fields.count("draft_vocab_size", fields.count("vocab_size"))
        return fields.decoder_sizes() | {"draft_vocab_size": vocab_size}, fields.layer_ids(LAYER_IDS, engine.layer_offset)

    def stored_name(self, name: str, draft: DraftDescription, engine: Engine) -> str | None:
        if name in _VOCAB_MAPS and _is_whole(draft.network):
            return None  # they say nothing then, and vLLM refuses them
        return name.replace("midlayer.", "layers.0.") if engine is SPECULATORS else name

    def our_name(self, stored: str) -> str:
        return "midlayer." + stored.removeprefix("layers.0.") if stored.startswith("layers.0.") else stored

    def serve_options(self, draft: DraftDescription, engine: Engine) -> dict[str, Any]:
        steps = {"speculative-num-steps": draft.num_draft_tokens, "speculative-eagle-topk": 1}
        return steps if engine is SGLANG else {}

    def card_rows(self, network: Eagle3Config) -> dict[str, object]:
        return self.decoder_rows(network) | {"draft vocabulary": f"{network.draft_vocab_size} of {network.vocab_size}"}

    def settings(self, start: PublishedDraft, target: FrozenTarget) -> dict[str, Any]:
        own = start.tensors().get(EMBEDDING)
        return {} if own is None or same_tensor(own, target.embedding) else {"train_embeddings": True}

    def implied(self, network: Eagle3Config) -> set[str]:
        return {"t2d", EMBEDDING} | ({"d2t", HEAD} if _is_whole(network) else set())

    def complete(self, start: PublishedDraft, draft: nn.Module) -> None:
        """Both maps of the vocabulary; t2d follows from d2t."""
        assert isinstance(draft, Eagle3Draft)
        stored, vocab_size = start.tensors(), draft.config.vocab_size
        if "d2t" not in stored:
            draft.d2t.zero_()
        ids = draft.target_ids
        if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) != len(ids):
            raise UserError(
                f"{start.folder}: d2t does not map {len(ids)} draft ids to as many of {vocab_size} target ids (target id = "
                "draft id + d2t[draft id])"
            )
        draft.set_target_ids(ids)
        if "t2d" in stored and not torch.equal(stored["t2d"].to(draft.t2d), draft.t2d):
            raise UserError(f"{start.folder}: t2d names other tokens than d2t maps to")


def _is_whole(network: Eagle3Config) -> bool:
    return network.draft_vocab_size == network.vocab_size
