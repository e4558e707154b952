"""Folders that a run writes to for as long as it goes on."""

import os
from pathlib import Path

from lightning_dataflow.contracts.errors import UserError


class KeptFolder:
    """Notices that a folder was moved or removed, that another has its name now, or that it became read-only.

    Whoever would make it again, after a time, asks first: what is written next would be in another folder than the rest.
    A folder that is not there yet is not watched.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self._identity = _identity(self.path)
        self._is_writable = os.access(self.path, os.W_OK)

    def check(self) -> None:
        """Raise UserError unless the folder is where it was, and as it was."""
        if self._identity is not None and _identity(self.path) != self._identity:
            raise UserError(
                f"{self.path} was moved or removed while a run used it: put it back, and resume with ckpt_path=last"
            )
        if self._is_writable and not os.access(self.path, os.W_OK):
            raise UserError(
                f"{self.path} cannot be written to any more (Read-only file system, or its permissions were changed): fix "
                "that, and resume with ckpt_path=last"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
