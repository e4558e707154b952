"""Tokenised prompts in files that all processes of a machine share."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dataflow.contracts import PeerTimeoutError
from lightning_dataflow.contracts.errors import NO_LOCKS
from lightning_dataflow.contracts.waiting import try_lock, wait_until
from lightning_dataflow.prompts.dataset import SAMPLE, PromptArrays

IDS, MASK, SAMPLES, FACTS = "input_ids.bin", "loss_mask.bin", "samples.bin", "facts.json"
POLL_S = 0.1
UNUSED_S = 30 * 24 * 3600.0
"""Prompts that nobody has read for so long are deleted."""


class PromptWriter:
    """Appends samples to the files of a folder, 5 bytes a token."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self.num_tokens = 0
        self._ids, self._mask, self._samples = ((folder / name).open("wb") for name in (IDS, MASK, SAMPLES))

    def add(self, input_ids: "np.ndarray[Any, Any]", loss_mask: "np.ndarray[Any, Any]", record: int, turn: int) -> None:
        """Append one sample."""
        self.num_tokens += len(input_ids)
        self._ids.write(input_ids.astype("<i4").tobytes())
        self._mask.write(loss_mask.astype("u1").tobytes())
        self._samples.write(np.array((self.num_tokens, record, turn), dtype=SAMPLE).tobytes())

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Close the files and write `facts`, without which the folder is not complete."""
        for file in (self._ids, self._mask, self._samples):
            file.close()
        (self.folder / FACTS).write_text(json.dumps(facts))


def read_arrays(folder: Path) -> tuple[PromptArrays, dict[str, Any]]:
    """The samples, mapped into memory, and the facts of a finished folder."""

    def mapped(name: str, dtype: Any) -> Any:
        path = folder / name
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)

    arrays = PromptArrays(input_ids=mapped(IDS, "<i4"), loss_mask=mapped(MASK, "u1"), samples=mapped(SAMPLES, SAMPLE))
    return arrays, json.loads((folder / FACTS).read_text())


def cached(folder: Path, build: Callable[[Path], None], timeout_s: float) -> Path:
    """`folder`, built first by one process of this machine if it is not there.

    Args:
        build: fills the folder that it is given.
        timeout_s: for another process that builds it.

    Raises:
        PeerTimeoutError: it did not end in time.
    """
    if not (folder / FACTS).exists():
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder.with_suffix(".lock"), timeout_s):
            if not (folder / FACTS).exists():
                _remove_unused(folder.parent)
                _build(folder, build)
    (folder / FACTS).touch()
    return folder


def _remove_unused(root: Path) -> None:
    """Also what killed processes left, which has no facts."""
    for ids in root.glob(f"*/{IDS}"):
        facts = ids.with_name(FACTS)
        with suppress(FileNotFoundError):  # another process removes it too
            used = (facts if facts.exists() else ids).stat().st_mtime
            if time.time() - used > UNUSED_S:
                shutil.rmtree(ids.parent, ignore_errors=True)


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    """In a folder of its own, so that one that was interrupted is never taken for a finished one."""
    unfinished = folder.with_suffix(f".{os.getpid()}")
    try:
        build(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    """The lock ends with its process."""
    with path.open("a+") as file:
        who = f"another process of this machine that tokenises the prompts ({path})"
        if not wait_until(lambda: _try_lock(file.fileno()), timeout_s, POLL_S, who):
            raise PeerTimeoutError(f"the process that tokenises the prompts (lock {path}) did not end in {timeout_s:g} s")
        yield


def _try_lock(file: int) -> bool:
    try:
        return try_lock(file)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return True  # without locks two processes may tokenise at once, and the last one's files stay
