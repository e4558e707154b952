"""Secrets, which are read from files, so that no log, configuration or command line shows them."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dataflow.contracts import UserError

if TYPE_CHECKING:
    from lightning_dataflow.config.schema import StoreConfig, TargetConfig

log = logging.getLogger(__name__)


def read_secret_file(path: str | None, setting: str) -> str | None:
    """The content of the file that `setting` names, without white space around it."""
    if path is None:
        return None
    try:
        if Path(path).stat().st_mode & 0o004:
            log.warning("%s=%s can be read by everybody on this machine: chmod 600 %s", setting, path, path)
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"cannot read {setting}={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{setting}={path} is not text: a secret is one line of UTF-8") from error


def read_api_key(target: "TargetConfig") -> str | None:
    """The key of capture servers."""
    key = read_secret_file(target.api_key_file, "target.api_key_file")
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise UserError(f"target.api_key_file={target.api_key_file} holds no key: it must be one line of printable ASCII")
    return key


def read_secret(store: "StoreConfig") -> str | None:
    """The secret of store=shared_dir."""
    return read_secret_file(store.secret_file, "store.secret_file")
