"""Reads a checkpoint from anywhere without running code in it. If something is wrong with it, the error is one line."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from lightning_dataflow.checkpoints.markers import has_marker, incomplete
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import first_line

METADATA, HEADER = ".metadata", "meta.pt"
_DAMAGED = (LookupError, TypeError, AttributeError, ValueError, OSError, EOFError, RuntimeError, pickle.UnpicklingError)
_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "Path"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def read_header(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds beside its large tensors. Those of a folder are not read, those of a file only mapped.

    Raises:
        UserError: there is no checkpoint, it is incomplete, or something in it would have to be unpickled.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint {path}: give a file, the folder of a sharded one, of a run, or of a draft")
    if path.is_dir() and not (path / METADATA).exists():
        raise UserError(f"{path} holds no checkpoint: give a file, the folder of a sharded one, of a run, or of a draft")
    if has_marker(path) and (reason := incomplete(path)) is not None:
        raise UserError(f"{path} is not a complete checkpoint: {reason}")
    try:
        if path.is_dir():
            _check_shards(path)
            header = torch.load(path / HEADER, map_location="cpu", weights_only=True)
        else:
            header = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        header["strategy"], header["hyper_parameters"]
    except _DAMAGED as error:
        raise UserError(f"{path} is not a draft's checkpoint ({first_line(error)})") from error
    return header


class _MetadataUnpickler(pickle.Unpickler):
    """Accepts the records of torch.distributed.checkpoint and torch's dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}")


def _check_shards(folder: Path) -> None:
    """Raise an error if torch would unpickle anything unsafe, or if shards are missing or cut short.

    Torch unpickles `.metadata`, and the values in shards that are no tensors.
    """
    with (folder / METADATA).open("rb") as handle:
        metadata = _MetadataUnpickler(handle).load()
    tensors = {name for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "chunks")}
    for index, place in metadata.storage_data.items():
        shard = folder / place.relative_path
        if Path(place.relative_path).name != place.relative_path or place.offset < 0 or place.length < 0:
            raise ValueError(f"{METADATA} points outside of the checkpoint")
        if not shard.is_file() or shard.stat().st_size < place.offset + place.length:
            raise ValueError(f"{shard.name} is missing or cut short")
        if index.fqn not in tensors:
            with shard.open("rb") as handle:
                handle.seek(place.offset)
                torch.load(io.BytesIO(handle.read(place.length)), map_location="cpu", weights_only=True)
