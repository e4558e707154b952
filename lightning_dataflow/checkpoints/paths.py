"""Paths of checkpoints: which ones a run may remove, or take over from a checkpoint, which may come from anywhere."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

_PATHS = ("kth_best_model_path", "last_model_path", "best_model_path")


def local_path(path: str | Path) -> Path | None:
    """`path` on this machine's disks, also through `file://` and `local://`; None if fsspec would look elsewhere."""
    protocol, separator, rest = str(path).partition("://")
    if not separator:
        return Path(path)
    return Path(rest) if protocol in ("file", "local") else None


def resolve_folder(folder: str | Path) -> str:
    """A folder without symlinks or `..`, for comparisons. A folder elsewhere is left as it is written."""
    local = local_path(folder)
    return str(folder).rstrip("/") if local is None else os.path.realpath(local)


def folder_of(path: str | Path) -> str | None:
    """The folder that directly holds `path`, resolved; None if the path is not named `*.ckpt`.

    A symlink belongs to the folder that holds it, not to that of its target. Names with wildcards are refused where fsspec
    would expand them.
    """
    local = local_path(path)
    text = str(path if local is None else local)
    folder, name = os.path.split(text)
    if not name.endswith(".ckpt") or "\0" in text or (local is None and set(name) & set("*?[")):
        return None
    return resolve_folder(folder)


def forget_foreign_paths(callbacks: Iterable[Any], states: dict[str, Any]) -> None:
    """Drop the state of each ModelCheckpoint that names anything but checkpoints directly in its folder, with a warning.

    Lightning would remove the files that are named there as soon as it has newer or better ones. The state is also dropped
    when a run was moved or copied: the checkpoints in the other folder are not this run's.

    Args:
        callbacks: the Trainer's, after their `setup`, which determines their folders.
        states: the entry `callbacks` of a checkpoint.
    """
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.state_key not in states or callback.dirpath is None:
            continue
        state, folder = states[callback.state_key], resolve_folder(callback.dirpath)
        named = [*state.get("best_k_models", ()), *(state.get(name) for name in _PATHS)]
        foreign = [path for path in named if path and (not isinstance(path, str) or folder_of(path) != folder)]
        if foreign:
            del states[callback.state_key]
            rank_zero_warn(
                f"the checkpoint's list of best and last checkpoints names {foreign[0]!r}, which is no *.ckpt directly in "
                f"{callback.dirpath}: the list is left out, and this run starts a new one"
            )
