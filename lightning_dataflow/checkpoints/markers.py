"""Completion markers: a small file beside a checkpoint, written once all ranks have written their parts.

A marker records the size of every file of the checkpoint, and a digest of its last 64 KiB. Torch's files end in a directory
with the checksums of their content, so the marker detects truncated, missing and exchanged files at the cost of one short
read per file. It does not detect bytes that a disk changed inside a file, and it covers only files that rank 0 sees: ranks
of several machines need one shared folder.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts.foreign import parse_json, read_bounded

log = logging.getLogger(__name__)

SUFFIX, PART = ".complete", ".part"
TAIL_BYTES = 1 << 16
_STEP = re.compile(r"step[-=](\d+)")
_SHARDED = (".metadata", "meta.pt")  # a folder that Lightning wrote has one of them


def latest_checkpoint(folder: str | Path, *, on_skip: Callable[[str], None] = log.warning) -> Path | None:
    """The newest complete checkpoint below `folder`, for `trainer.fit(…, ckpt_path=…)`; None if there is none.

    Only checkpoints of a DataFlowTrainer count: other Trainers leave no markers, so a whole checkpoint of theirs looks like
    half of one.

    Args:
        on_skip: called with one line for each newer checkpoint that is not complete.
    """
    for path in sorted(Path(folder).glob("*.ckpt"), key=_age, reverse=True):
        if path.is_symlink():  # its target is in the list too
            continue
        if (reason := incomplete(path)) is None:
            return path
        on_skip(f"{path} is skipped, it is not a complete checkpoint: {reason}")
    return None


def abandon_later(path: Path) -> list[Path]:
    """Training resumes from `path`: checkpoints of later steps beside it no longer count as complete. Returns them."""
    later = [other for other in path.parent.glob("*.ckpt") if has_marker(other) and _age(other)[0] > _age(path)[0]]
    for other in later:
        void(other)
    return later


def incomplete(path: Path) -> str | None:
    """Why `path` is no complete checkpoint; None if it is one."""
    try:
        files = _read_marker(path)["files"]
        recorded = {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except FileNotFoundError:
        return "it has no completion marker, so writing it never ended"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its completion marker is damaged ({error!r})"
    for name, (size, digest) in recorded.items():
        file = path / name if name else path
        if not file.is_file():
            return f"{file.name} is missing"
        if (actual := file.stat().st_size) != size:
            return f"{file.name} has {actual} bytes, {size} were written"
        if _digest(file) != digest:
            return f"{file.name} is not what was written"
    return None


def has_marker(path: Path) -> bool:
    """Whether a DataFlowTrainer finished writing `path`."""
    return _marker(path).is_file()


def mark_complete(path: Path, global_step: int) -> None:
    """Every rank has written its part: sync all files to the disk, then write the marker."""
    files = {"": path} if path.is_file() else {file.name: file for file in sorted(path.iterdir()) if file.is_file()}
    for file in (*files.values(), path, path.parent):
        _sync(file)
    recorded = {name: [file.stat().st_size, _digest(file)] for name, file in files.items()}
    part = hidden_part(_marker(path))
    part.write_text(json.dumps({"global_step": global_step, "files": recorded}))
    _sync(part)
    part.replace(_marker(path))
    _sync(path.parent)


def void(path: Path) -> None:
    """`path` is about to be written or removed: what it holds is no longer complete."""
    _marker(path).unlink(missing_ok=True)


def make_room(path: Path) -> None:
    """Before writing `path`: remove an older checkpoint of that name, so that none of its parts end up in the new one.

    Also removes half-written files that a killed process left in the folder.
    """
    void(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in (".ckpt", SUFFIX):
        for left in path.parent.glob(f".*{kind}{PART}"):
            left.unlink(missing_ok=True)
    if path.is_symlink() or _is_sharded(path):
        remove(path)


def remove(path: Path) -> bool:
    """Remove a checkpoint and its marker. Of a symlink, remove the link, not its target.

    Returns False for a folder that Lightning did not write, which stays.
    """
    is_folder = path.is_dir() and not path.is_symlink()
    if is_folder and not _is_sharded(path):
        return False
    void(path)
    if is_folder:
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return True


def hidden_part(path: Path) -> Path:
    """The name under which `path` is written, until it is whole."""
    return path.with_name(f".{path.name}{PART}")


def _is_sharded(path: Path) -> bool:
    return any((path / name).is_file() for name in _SHARDED)


def _marker(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _read_marker(path: Path) -> dict[str, Any]:
    return parse_json(read_bounded(_marker(path)), _marker(path).name)


def _age(path: Path) -> tuple[int, int]:
    """(step, time of writing), for sorting."""
    try:
        return int(_read_marker(path)["global_step"]), _marker(path).stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        match = _STEP.search(path.name)
        return int(match[1]) if match else -1, path.lstat().st_mtime_ns


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        handle.seek(max(0, file.stat().st_size - TAIL_BYTES))
        return hashlib.sha256(handle.read()).hexdigest()[:16]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
