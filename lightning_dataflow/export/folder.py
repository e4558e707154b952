"""Writing a draft's folder, all of it or nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.serve import check_draft
from lightning_dataflow.strategies.published.contract import DraftDescription
from lightning_dataflow.strategies.published.engines import MARK, Engine
from lightning_dataflow.strategies.published.reading import CONFIG

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WEIGHTS, CARD = "model.safetensors", "README.md"


def check_destination(folder: Path) -> None:
    """Raise UserError when `folder` is taken."""
    if folder.exists():
        raise UserError(f"{folder} exists: choose another folder to export to, or remove it")


def write_draft(
    folder: Path,
    engine: Engine,
    draft: DraftDescription,
    tensors: Mapping[str, Tensor],
    *,
    card: str = "",
    copies: Sequence[Path] = (),
) -> Path:
    """Write `config.json`, `model.safetensors`, the model card and copies of further files; the folder appears whole.

    Args:
        tensors: the draft's state dict; floating-point ones are cast to `draft.dtype`.

    Raises:
        UserError: the folder exists, or the engine does not serve such a draft.
    """
    if draft.dtype not in DTYPES:
        raise UserError(f"dtype={draft.dtype} is unknown: use {', '.join(DTYPES)}")
    dtype, export = DTYPES[draft.dtype], check_draft(draft, engine)
    check_destination(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workspace:
        part = Path(workspace) / folder.name
        part.mkdir()
        mark = {"format": engine.name, "version": version("lightning-dataflow")}
        config = export.fields(draft, engine) | {"dtype": draft.dtype, MARK: mark}
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        stored = {
            stored_name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
            for name, tensor in tensors.items()
            if (stored_name := export.stored_name(name, draft, engine)) is not None
        }
        try:
            save_file(stored, part / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {folder}: {error}") from error
        shutil.copymode(part / CONFIG, part / WEIGHTS)  # safetensors makes it readable by its owner only
        (part / CARD).write_text(card)
        for file in copies:
            shutil.copyfile(file, part / file.name)
        os.rename(part, folder)
    return folder
