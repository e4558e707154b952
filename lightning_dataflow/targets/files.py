"""The weight files of a target: which there are, and whether they are whole."""

import json
import os
import struct
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 << 20
"""As in safetensors."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: one file before an index, an index before others.

    Raises:
        UserError: there are none, the index names one that is missing, or one is cut short.
    """
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        files = _indexed(folder / INDEX)
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(_no_weights(folder))
    for file in files:
        read_header(file)
    return files


def find_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor, by its name."""
    return {
        name: (file, tuple(entry["shape"]))
        for file in weight_files(folder)
        for name, entry in read_header(file).items()
        if name != "__metadata__"
    }


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype, shape and data_offsets of each tensor. Raises UserError if the file is
    damaged or cut short."""
    remedy = "fetch the file again"
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = struct.unpack("<Q", handle.read(8).ljust(8, b"\xff"))[0]
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{file} is damaged or cut short ({size} bytes do not hold its header): {remedy}")
            header = json.loads(handle.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file} is damaged (its header is no safetensors header): {remedy}") from error
    if size < whole:
        raise UserError(f"{file} is cut short ({size} of {whole} bytes): {remedy}")
    return dict(header)


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(parse_json(index.read_bytes(), str(index))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {index}: fetch it again, or remove it if there is one {SINGLE}") from error
    if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{index} names {str(bad[0])[:80]!r}, which is no file of its folder: fetch the index again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{index} names {missing[0]}{more}, which the folder does not have: fetch what is missing, or remove the index "
            "if it is of an older copy"
        )
    return [index.parent / name for name in names]


def _no_weights(folder: Path) -> str:
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if not pickled:
        return f"no safetensors in {folder}: fetch the target's weights into it"
    return (
        f"{folder} has {pickled[0].name} and no safetensors, the only weights that are read here: fetch the target's "
        "safetensors, or ask its author for them"
    )
