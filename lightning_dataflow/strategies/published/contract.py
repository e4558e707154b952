"""How a strategy's drafts are written for serving engines, and read back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor, nn

from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.strategies.published.engines import MODEL_TYPE, SPECULATORS, Engine
from lightning_dataflow.strategies.published.fields import DRAFT_TOKENS, Fields

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DraftDescription:
    """What a folder says about a draft beside its weights.

    Attributes:
        strategy: name in the registry.
        network: the draft's configuration, a dataclass of the strategy.
        layer_ids: target layers that the draft reads; id i is the output of decoder layer i, counted from 0.
        num_target_layers, max_position_embeddings: of the target.
        num_draft_tokens: how many tokens it was trained to draft at a time, or its published folder names.
        head_bias: whether the target adds a bias to its head's products.
        target, target_architectures: where the target is, and its Hugging Face classes.
        dtype: of the stored weights.
    """

    strategy: str
    network: Any
    layer_ids: tuple[int, ...]
    num_target_layers: int
    max_position_embeddings: int
    num_draft_tokens: int
    target: str
    target_architectures: tuple[str, ...] = ()
    head_bias: bool = False
    dtype: str = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class PublishedDraft:
    """The content of a folder.

    Attributes:
        format: name of the engine whose format the folder has.
        network: sizes by the names of the strategy's configuration, without those that the target decides.
        hidden_size, vocab_size, target_hidden_size: which must be the target's.
        layer_ids: as in DraftDescription; None where the folder leaves them to the engine's default.
        num_target_layers, num_draft_tokens: None where the folder does not say.
    """

    folder: Path
    format: str
    strategy: str
    network: Mapping[str, Any]
    hidden_size: int
    vocab_size: int
    target_hidden_size: int
    layer_ids: tuple[int, ...] | None
    num_target_layers: int | None
    num_draft_tokens: int | None
    _places: Mapping[str, tuple[Path, str]] = field(repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """By our names, as they are stored; mapped into memory, so that only what is used is read."""
        files = {path: safe_open(path, framework="pt") for path, _ in self._places.values()}
        return {name: files[path].get_tensor(stored) for name, (path, stored) in self._places.items()}


class DraftExport(ABC):
    """The folders of one strategy's drafts. The draft needs a dataclass `config`.

    Attributes:
        served_as: the engines that serve these drafts, by name, and what each calls the algorithm.
        architectures: values of `architectures` in `config.json`; the first is written.
        section: field of `config.json` that holds the algorithm's own fields; those are looked up there first.
        marks: fields that tell these drafts from others with the same architecture.
        own_tensor_remedy: what to do if a folder has an embedding or head that differs from the target's.
    """

    served_as: ClassVar[Mapping[str, str]]
    architectures: ClassVar[tuple[str, ...]]
    section: ClassVar[str] = ""
    marks: ClassVar[Mapping[str, Any]] = {}
    own_tensor_remedy: ClassVar[str] = "start from another draft"

    def check(self, draft: DraftDescription, engine: Engine) -> None:  # noqa: B027
        """Raise UserError when the engine would not serve this draft as it was trained."""

    @abstractmethod
    def fields(self, draft: DraftDescription, engine: Engine) -> Config:
        """`config.json` of a draft that passed `check`."""

    @abstractmethod
    def read(self, fields: Fields, engine: Engine) -> tuple[dict[str, Any], tuple[int, ...] | None]:
        """Sizes of the network and layer ids (as in DraftDescription) from `config.json`. Raises UserError naming the field
        that asks for another network."""

    def stored_name(self, name: str, draft: DraftDescription, engine: Engine) -> str | None:
        """The name of one of our tensors in the file; None if it is left out."""
        return name

    def our_name(self, stored: str) -> str:
        """Our name of a stored tensor."""
        return stored

    def serve_options(self, draft: DraftDescription, engine: Engine) -> Mapping[str, Any]:
        """Further options of the engine's command."""
        return {}

    def cpu_caveat(self, sizes: Mapping[str, Any]) -> str | None:
        """A warning for those who measure a draft of such sizes with vLLM on a CPU."""
        return None

    def card_rows(self, network: Any) -> dict[str, object]:
        """Rows that describe the network in the model card."""
        return {}

    def settings(self, start: PublishedDraft, target: FrozenTarget) -> dict[str, Any]:
        """Arguments of the module that only the tensors of a folder tell."""
        return {}

    def implied(self, network: Any) -> set[str]:
        """Tensors that a folder may leave out, since they follow from others or from the target."""
        return set()

    def complete(self, start: PublishedDraft, draft: nn.Module) -> None:  # noqa: B027
        """Set the tensors that follow from others, after those of the folder were copied. Raises UserError."""

    def decoder_fields(self, draft: DraftDescription) -> Config:
        """Fields of the draft's decoder layers, as in transformers' LlamaConfig."""
        network = draft.network
        return {
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
            "rope_parameters": {"rope_type": "default", **(network.rope_scaling or {}), "rope_theta": network.rope_theta},
            "max_position_embeddings": draft.max_position_embeddings,
            "vocab_size": network.vocab_size,
            "tie_word_embeddings": False,
        }

    def speculators_fields(self, draft: DraftDescription, layers: Config, draft_vocab_size: int) -> Config:
        """Fields that every draft in the speculators format has. The target is named in the folder."""
        algorithm = self.served_as[SPECULATORS.name]
        return {
            MODEL_TYPE: algorithm,
            "speculators_config": {
                "algorithm": algorithm,
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", DRAFT_TOKENS: draft.num_draft_tokens}],
                "verifier": {"name_or_path": draft.target, "architectures": list(draft.target_architectures)},
            },
            "transformer_layer_config": layers,
            "draft_vocab_size": draft_vocab_size,
            "target_hidden_size": draft.network.hidden_size,  # a draft is as wide as its target here
            "tie_word_embeddings": False,
            "dtype": draft.dtype,
        }

    def decoder_rows(self, network: Any) -> dict[str, object]:
        """Sizes of the decoder layers in the model card's table."""
        heads = network.num_attention_heads, network.num_key_value_heads, network.head_dim
        return {
            "hidden size": network.hidden_size,
            "heads, key-value heads, head size": ", ".join(map(str, heads)),
        }
