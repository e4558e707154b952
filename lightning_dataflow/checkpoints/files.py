"""Checkpoints of one file: written atomically, read without unpickling."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dataflow.checkpoints.markers import hidden_part, remove
from lightning_dataflow.checkpoints.paths import folder_of, local_path, resolve_folder


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's TorchCheckpointIO, with four differences.

    A file gets its name once it is whole. (Lightning copies a checkpoint through memory twice, and through the folder for
    temporary files, where a kill leaves it.) Loading always uses `weights_only=True`. A checkpoint's completion marker is
    removed before the checkpoint. And nothing is removed but a `*.ckpt` directly in a folder that was given to `admit`.
    """

    def __init__(self) -> None:
        self._folders: set[str] = set()

    def admit(self, folder: str | Path) -> None:
        """This run keeps checkpoints directly in `folder`, so it may remove checkpoints there."""
        self._folders.add(resolve_folder(folder))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        local = local_path(path)
        if local is None or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        local.parent.mkdir(parents=True, exist_ok=True)
        part = hidden_part(local)
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
            part.replace(local)
        except (OSError, RuntimeError) as error:  # torch hides the disk's error in a RuntimeError
            part.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError) and cause.errno is not None:
                raise OSError(cause.errno, os.strerror(cause.errno), str(local)) from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """The path may come from a checkpoint's state. Anything but a checkpoint of this run stays, with a warning."""
        local, is_ours = local_path(path), folder_of(path) in self._folders
        if local is None and is_ours:
            super().remove_checkpoint(path)
        elif local is None or (not (is_ours and remove(local)) and os.path.lexists(local)):
            rank_zero_warn(f"{path} is not removed: it is no checkpoint (*.ckpt) directly in a folder of this run")
