"""Reading a draft's folder, ours or somebody else's: what it is, and its tensors by our names. Nothing is unpickled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.base import Config
from lightning_dataflow.export.fields import Fields
from lightning_dataflow.export.folder import CONFIG
from lightning_dataflow.export.registry import format_of

EAGLE3_CLASSES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
BLOCK_CLASSES = ("DFlashDraftModel",)
_MASK_EMBEDDING = "mask_embedding.pt"


@dataclass(frozen=True, kw_only=True)
class PublishedDraft:
    """What a folder holds. Tensors are read when they are asked for.

    Attributes:
        network: sizes by the names of the strategy's configuration, without those that the target decides.
        hidden_size, vocab_size, target_hidden_size: which must be the target's.
        layer_ids: our way; None where the folder leaves it to the engine's default.
        num_target_layers, num_draft_tokens: None where the folder does not say.
        shapes: of the tensors, by our names.
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
    shapes: Mapping[str, tuple[int, ...]]
    _places: Mapping[str, tuple[Path, str]] = field(repr=False)

    def tensor(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(stored)


def is_published(folder: str | Path) -> bool:
    """Whether `folder` looks like a draft's folder (a `config.json` beside safetensors)."""
    return (Path(folder) / CONFIG).is_file()


def read_draft(folder: str | Path) -> PublishedDraft:
    """Read what a folder says of its draft.

    Raises:
        UserError: it is no draft that a strategy here could train on.
    """
    folder = Path(folder)
    config = _read_config(folder)
    form = format_of(config)
    try:
        fields = Fields(folder / CONFIG, form.plain(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error}") from error
    strategy = _strategy(folder, fields)
    network, layer_ids = fields.eagle3() if strategy == "eagle3" else fields.block(domino=strategy == "domino")
    if (folder / _MASK_EMBEDDING).exists():
        raise UserError(f"{folder} has a {_MASK_EMBEDDING}: a mask token with an embedding of its own is not supported")
    places, shapes = _tensors(folder, strategy)
    hidden_size = fields.count("hidden_size")
    return PublishedDraft(
        folder=folder,
        format=form.name,
        strategy=strategy,
        network=network,
        hidden_size=hidden_size,
        vocab_size=fields.count("vocab_size"),
        target_hidden_size=fields.count("target_hidden_size", hidden_size),
        layer_ids=layer_ids,
        num_target_layers=fields.num_target_layers() if strategy != "eagle3" else None,
        num_draft_tokens=fields.num_draft_tokens(),
        shapes=shapes,
        _places=places,
    )


def _read_config(folder: Path) -> Config:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no draft in {folder} ({CONFIG} is missing): give a folder for SGLang or vLLM, as lightning-dataflow export "
            "writes of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object")
    return config


def _strategy(folder: Path, fields: Fields) -> str:
    classes = fields.values.get("architectures")
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{folder / CONFIG} names no class of a draft (architectures)")
    if classes[0] in EAGLE3_CLASSES:
        return "eagle3"
    if classes[0] in BLOCK_CLASSES:
        projector = fields.own("projector_type")
        if projector not in (None, "domino"):
            raise UserError(f"{folder} is a DFlash draft with projector_type={projector}, which no strategy here trains")
        return "domino" if projector == "domino" else "dflash"
    raise UserError(
        f"{folder} holds a {classes[0]}, not a draft that can be trained on: "
        f"{', '.join((*EAGLE3_CLASSES, *BLOCK_CLASSES))} can"
    )


def _tensors(folder: Path, strategy: str) -> tuple[dict[str, tuple[Path, str]], dict[str, tuple[int, ...]]]:
    places: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118  # it is no mapping
                    name = _our_name(stored, strategy)
                    if name.endswith("rotary_emb.inv_freq"):
                        continue
                    if name in places:
                        raise UserError(f"{folder} has {name} twice, in {places[name][0].name} and {path.name}")
                    places[name] = path, stored
                    shapes[name] = tuple(file.get_slice(stored).get_shape())
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    if not places:
        raise UserError(f"no safetensors in {folder}: convert other files first, they would have to be unpickled")
    return places, shapes


def _our_name(name: str, strategy: str) -> str:
    """Published names differ by a prefix, or by what they call EAGLE3's only layer."""
    name = name.removeprefix("model.")
    return name.replace("layers.0.", "midlayer.", 1) if strategy == "eagle3" and name.startswith("layers.0.") else name
