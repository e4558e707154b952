"""What every format of a draft's folder has in common: the fields of Hugging Face configurations."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.blocks.network import SLIDING, BlockConfig
from lightning_dataflow.strategies.domino.network import DominoConfig
from lightning_dataflow.strategies.eagle3.network import Eagle3Config

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """What a folder says of a draft beside its weights.

    Attributes:
        network: sizes.
        layer_ids: of the target that the draft reads; id i is the output of decoder layer i, counted from 0.
        num_target_layers, max_position_embeddings: of the target.
        num_draft_tokens: how many tokens it was trained to draft at a time, or a published folder says.
        target, target_architectures: where the target is, and its Hugging Face classes.
    """

    strategy: str
    network: Eagle3Config | BlockConfig
    layer_ids: tuple[int, ...]
    num_target_layers: int
    max_position_embeddings: int
    num_draft_tokens: int
    target: str
    target_architectures: tuple[str, ...] = ()


class DraftFormat(ABC):
    """One way to lay out a folder.

    Attributes:
        name: marks folders of this format, so that they can be told when read back.
        title: for people.
        strategies: that it can express.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    strategies: ClassVar[tuple[str, ...]]

    def check(self, draft: DraftSpec) -> None:
        """Raise UserError when the engine would not serve this draft as it was trained."""
        if draft.strategy not in self.strategies:
            raise UserError(self.refusal(draft.strategy))

    def refusal(self, strategy: str) -> str:
        """Why a strategy cannot be expressed."""
        return f"{self.title} does not serve {strategy} drafts, only {', '.join(self.strategies)}"

    @abstractmethod
    def config(self, draft: DraftSpec, dtype: str) -> Config:
        """`config.json` of a draft that passed `check`."""

    @abstractmethod
    def serve_command(self, draft: DraftSpec, folder: str) -> str:
        """The shell command that serves the target with this draft."""

    def tensor_name(self, name: str) -> str:
        """The name in the file of a tensor of ours."""
        return name

    def plain(self, config: Mapping[str, Any]) -> Config:
        """A configuration of this format as one of SGLang's, with layer ids counted our way."""
        return dict(config)


def layer_fields(draft: DraftSpec) -> Config:
    """Fields of the draft's decoder layers: LlamaConfig's for EAGLE3, Qwen3Config's for DFlash."""
    network = draft.network
    fields: Config = {
        "model_type": "llama",
        "hidden_size": network.hidden_size,
        "intermediate_size": network.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": network.num_attention_heads,
        "num_key_value_heads": network.num_key_value_heads,
        "head_dim": network.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": network.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": network.rope_theta},
        "max_position_embeddings": draft.max_position_embeddings,
        "vocab_size": network.vocab_size,
        "tie_word_embeddings": False,
    }
    if isinstance(network, Eagle3Config):
        return fields | {"mlp_bias": False}
    layer_types = list(network.layer_types) or ["full_attention"] * network.num_layers
    return fields | {
        "model_type": "qwen3",
        "num_hidden_layers": network.num_layers,
        "layer_types": layer_types,
        "use_sliding_window": SLIDING in layer_types,
        "sliding_window": network.sliding_window,
        "max_window_layers": 0 if SLIDING in layer_types else network.num_layers,
    }


def eagle3_fields(draft: DraftSpec, layer_ids: list[int]) -> Config:
    """Fields of a plain EAGLE3 folder, with the layer ids as its engine counts them."""
    network = draft.network
    assert isinstance(network, Eagle3Config)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_fields(draft),
        "draft_vocab_size": network.draft_vocab_size,
        "target_hidden_size": network.target_hidden_size,
        "num_aux_hidden_states": network.num_aux_layers,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": layer_ids,
            "norm_before_fc": False,
        },
    }


def block_fields(draft: DraftSpec) -> Config:
    """Fields of a plain DFlash or Domino folder; both engines count their layers our way."""
    network = draft.network
    assert isinstance(network, BlockConfig)
    own: Config = {
        "block_size": network.block_size,
        "num_target_layers": draft.num_target_layers,
        "target_layer_ids": list(draft.layer_ids),
        "mask_token_id": network.mask_token_id,
    }
    if isinstance(network, DominoConfig):
        own |= {
            "projector_type": "domino",
            "shift_label": network.shift_label,
            "pure_draft_prefix_len": network.pure_draft_prefix_len,
            "gru_hidden_dim": network.gru_hidden_dim,
            "emb_dim": network.emb_dim,
        }
    return {"architectures": ["DFlashDraftModel"], **layer_fields(draft), "dflash_config": own}
