"""Writing a draft's folder, all of it or nothing."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.base import DraftFormat, DraftSpec
from lightning_dataflow.export.registry import MARK
from lightning_dataflow.strategies.eagle3.network import Eagle3Config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def check_destination(folder: Path) -> None:
    """Raise UserError when `folder` is taken."""
    if folder.exists():
        raise UserError(f"{folder} exists: choose another folder to export to, or remove it")


def write_draft(
    folder: Path,
    form: DraftFormat,
    draft: DraftSpec,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str = "bfloat16",
    card: str = "",
    copies: Sequence[Path] = (),
) -> Path:
    """Write `config.json`, `model.safetensors`, the model card and copies of further files; the folder appears whole.

    Args:
        tensors: the draft's state dict; floating-point ones are cast to `dtype`.

    Raises:
        UserError: the folder exists, or the engine does not serve such a draft.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is unknown: use {', '.join(DTYPES)}")
    form.check(draft)
    check_destination(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    part.mkdir()
    try:
        mark = {"format": form.name, "version": version("lightning-dataflow")}
        (part / CONFIG).write_text(json.dumps(form.config(draft, dtype) | {MARK: mark}, indent=2) + "\n")
        stored = {
            form.tensor_name(name): (tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor).cpu().contiguous()
            for name, tensor in tensors.items()
            if not _implied(name, draft)
        }
        save_file(stored, part / WEIGHTS, metadata={"format": "pt"})
        (part / WEIGHTS).chmod(0o666 & ~_umask())  # safetensors keeps others from reading it
        (part / CARD).write_text(card)
        for file in copies:
            shutil.copyfile(file, part / file.name)
        os.rename(part, folder)
    except SafetensorError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot write {folder}: {error}") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _implied(name: str, draft: DraftSpec) -> bool:
    """The maps of a vocabulary that is not reduced are no news, and vLLM refuses them."""
    network = draft.network
    whole = isinstance(network, Eagle3Config) and network.draft_vocab_size == network.vocab_size
    return whole and name in ("d2t", "t2d")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
