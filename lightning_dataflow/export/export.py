"""From a checkpoint to a folder that SGLang or vLLM serves."""

from pathlib import Path
from typing import Any

from lightning_dataflow.checkpoints.markers import latest_checkpoint
from lightning_dataflow.checkpoints.reading import HEADER, read_header
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import parse_json
from lightning_dataflow.export.card import conversion_section, model_card
from lightning_dataflow.export.folder import DTYPES, check_destination, write_draft
from lightning_dataflow.export.serve import check_engine
from lightning_dataflow.export.training import training_sections
from lightning_dataflow.strategies.checkpoint import load_module
from lightning_dataflow.strategies.common.target_tensors import has_head_bias
from lightning_dataflow.strategies.module import DraftModule
from lightning_dataflow.strategies.published.contract import DraftDescription
from lightning_dataflow.strategies.published.engines import resolve_engine
from lightning_dataflow.strategies.published.reading import is_published, read_draft
from lightning_dataflow.strategies.warm_start import check_finite

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def export_draft(
    source: str | Path,
    folder: str | Path,
    *,
    engine: str,
    format: str = "plain",
    dtype: str = "bfloat16",
    target: str | None = None,
    tokenizer: bool = False,
) -> Path:
    """Write a draft as `engine` reads it: configuration, weights, and a model card. Returns the folder.

    Args:
        source: a checkpoint (file or folder), a run, whose newest complete checkpoint is taken, or a published draft's
            folder, which is converted.
        folder: must not exist.
        engine: `sglang` or `vllm`.
        format: `plain`; for vLLM also `speculators`.
        dtype: of the weights: `bfloat16`, `float16`, or `float32` for those of the checkpoint.
        target: where the target is now, if it moved. Serve commands and the speculators format name it
            as given here, and `folder` as given.
        tokenizer: copy the target's tokenizer files along.

    Raises:
        UserError: `folder` exists, there is no checkpoint, or the engine does not serve such a draft.
        NotFiniteError: its weights hold NaN or infinity, or would in `dtype`.
    """
    layout, folder = resolve_engine(engine, format), Path(folder)
    check_destination(folder)
    checkpoint = find_checkpoint(Path(source))
    published = read_draft(checkpoint) if is_published(checkpoint) and not (checkpoint / HEADER).exists() else None
    header = read_header(checkpoint) if published is None else {}
    check_engine(published.strategy if published else header["strategy"], layout)  # before the target's folder is read
    num_draft_tokens = published.num_draft_tokens if published else None
    module = load_module(checkpoint, target=target)
    draft = describe(module, dtype=dtype, num_draft_tokens=num_draft_tokens)
    if published is None:
        training = training_sections(header, _read_result(checkpoint))
    else:
        training = [conversion_section(draft, assumed=num_draft_tokens is None)]
    card = model_card(layout, draft, training, folder=str(folder))
    files = [Path(draft.target) / name for name in TOKENIZER_FILES] if tokenizer else []
    copies = [file for file in files if file.is_file()]
    if tokenizer and not copies:
        raise UserError(f"no tokenizer in {draft.target}: leave --tokenizer out")
    tensors = module.draft.state_dict()
    if dtype in DTYPES:
        cast = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items() if tensor.is_floating_point()}
        check_finite(checkpoint, cast, f"dtype={dtype} is too narrow for it, use bfloat16 or float32")
        tensors |= cast
    return write_draft(folder, layout, draft, tensors, card=card, copies=copies)


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that `source` is or, being a run, has. Raises UserError where there is none."""
    if not (source / "checkpoints").is_dir():
        return source
    checkpoint = latest_checkpoint(source / "checkpoints")
    if checkpoint is None:
        raise UserError(f"no complete checkpoint in {source / 'checkpoints'}: name the one to export")
    return checkpoint


def describe(module: DraftModule, *, dtype: str = "bfloat16", num_draft_tokens: int | None = None) -> DraftDescription:
    """What a folder says about the draft of a module.

    Args:
        num_draft_tokens: that a published draft says; by default as the module trains.
    """
    info = module.target_info
    path = Path(info.path) / "config.json"
    config = parse_json(path.read_text(), str(path))
    return DraftDescription(
        strategy=module.strategy_name,
        network=module.draft.config,
        layer_ids=module.layer_ids,
        num_target_layers=info.num_layers,
        max_position_embeddings=info.max_position_embeddings,
        num_draft_tokens=num_draft_tokens or module.num_draft_tokens,
        target=info.path,
        target_architectures=tuple(config.get("architectures") or ()),
        head_bias=has_head_bias(info),
        dtype=dtype,
    )


def _read_result(checkpoint: Path) -> dict[str, Any]:
    """`result.json` of the checkpoint's run; empty if there is none."""
    path = checkpoint.resolve().parent.parent / "result.json"
    if checkpoint.resolve().parent.name != "checkpoints" or not path.is_file():
        return {}
    result: dict[str, Any] = parse_json(path.read_text(), str(path))
    return result
