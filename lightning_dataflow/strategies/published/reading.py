"""Reading a draft's folder, ours or another tool's: its strategy, and its tensors by our names. Nothing is unpickled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import parse_json
from lightning_dataflow.strategies.published.contract import Config, DraftExport, PublishedDraft
from lightning_dataflow.strategies.published.engines import MODEL_TYPE, SPECULATORS, engine_of
from lightning_dataflow.strategies.published.fields import DRAFT_TOKENS, SUPPORTED, Fields
from lightning_dataflow.strategies.registry import available_strategies, resolve_strategy
from lightning_dataflow.targets.files import tensor_shapes

CONFIG = "config.json"
_MASK_EMBEDDING = "mask_embedding.pt"


def is_published(folder: str | Path) -> bool:
    """Whether `folder` looks like a draft's folder (a `config.json` beside safetensors)."""
    return (Path(folder) / CONFIG).is_file()


def read_draft(folder: str | Path) -> PublishedDraft:
    """Read what a folder says about its draft.

    Raises:
        UserError: it is no draft that a strategy here could train on.
    """
    folder = Path(folder)
    path, config = folder / CONFIG, _read_config(folder)
    engine = engine_of(config)
    try:
        values = _flatten(config) if engine is SPECULATORS else config
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    strategy, export = _claimant(path, values)
    fields = Fields(path, values, export.section)
    fields.refuse_others(SUPPORTED)
    network, layer_ids = export.read(fields, engine)
    if (folder / _MASK_EMBEDDING).exists():
        raise UserError(f"{folder} has a {_MASK_EMBEDDING}: a mask token with an embedding of its own is not supported")
    hidden_size = fields.count("hidden_size")
    return PublishedDraft(
        folder=folder,
        format=engine.name,
        strategy=strategy,
        network=network,
        hidden_size=hidden_size,
        vocab_size=fields.count("vocab_size"),
        target_hidden_size=fields.count("target_hidden_size", hidden_size),
        layer_ids=layer_ids,
        num_target_layers=fields.optional_count("num_target_layers"),
        num_draft_tokens=fields.optional_count(DRAFT_TOKENS),
        _places=_find_tensors(folder, export),
    )


def _read_config(folder: Path) -> Config:
    path = folder / CONFIG
    try:
        config = parse_json(path.read_text(), str(path))
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


def _flatten(config: Mapping[str, Any]) -> Config:
    """A configuration in the speculators format with the layers' fields, and the number of tokens to draft, on top."""
    layers = config.get("transformer_layer_config")
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    draft_tokens = methods[0].get(DRAFT_TOKENS)  # of the first method, the one that vLLM takes
    return {**(layers if isinstance(layers, dict) else {}), **config, DRAFT_TOKENS: draft_tokens}


def _claimant(path: Path, values: Config) -> tuple[str, DraftExport]:
    """The strategy that trains such drafts, by the most specific of the marks that fit."""
    exports = {name: export for name in available_strategies() if (export := resolve_strategy(name).export) is not None}
    if MODEL_TYPE in values:
        types = {kind: name for name, export in exports.items() if (kind := export.served_as.get(SPECULATORS.name))}
        if (kind := str(values[MODEL_TYPE])) not in types:
            raise UserError(f"{path}: drafts of {MODEL_TYPE}={kind} cannot be read, only {', '.join(types)}")
        return types[kind], exports[types[kind]]
    classes = values.get("architectures")
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{path} names no class of a draft (architectures)")
    for name, export in sorted(exports.items(), key=lambda item: -len(item[1].marks)):
        if classes[0] in export.architectures:
            fields = Fields(path, values, export.section)
            if all(fields.get(mark) == value for mark, value in export.marks.items()):
                return name, export
    known = sorted({name for export in exports.values() for name in export.architectures})
    raise UserError(f"{path.parent} holds a {classes[0]}, not a draft that can be trained on: {', '.join(known)} can")


def _find_tensors(folder: Path, export: DraftExport) -> dict[str, tuple[Path, str]]:
    """File of each tensor, and its name there, by our names."""
    places: dict[str, tuple[Path, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for stored in tensor_shapes(path):
            name = export.our_name(stored.removeprefix("model."))
            if name in places:
                raise UserError(f"{folder} has {name} twice, in {places[name][0].name} and {path.name}")
            if not name.endswith("rotary_emb.inv_freq"):
                places[name] = path, stored
    if not places:
        raise UserError(f"no safetensors in {folder}: convert other files first, they would have to be unpickled")
    return places
