"""Checkpoints of one file: written beside their place, read without unpickling."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_dataflow.checkpoints.markers import hidden_part, void
from lightning_dataflow.checkpoints.reading import is_remote


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's own, with three differences.

    A file gets its name once it is whole. (Lightning's passes through memory, twice, and the folder for temporary files,
    from where it is copied when that is another disk; a kill leaves it there.) It is loaded with `weights_only=True`,
    whatever is asked for. And its completion marker is removed before it is.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """See CheckpointIO."""
        if is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = hidden_part(path)
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch's own says nothing of the disk
            part.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError) and cause.errno is not None:
                raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """See CheckpointIO."""
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """See CheckpointIO."""
        if not is_remote(path):
            void(Path(path))
        super().remove_checkpoint(path)
