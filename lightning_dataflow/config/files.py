"""Files that settings name. Secrets are in files, so that no log, configuration or command line shows them."""

import logging
import os
from contextlib import suppress
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.validation import check_id
from lightning_dataflow.control.redis.address import RedisAddress

if TYPE_CHECKING:
    from lightning_dataflow.config.schema import StoreConfig, TargetConfig

log = logging.getLogger(__name__)

DATE = "date.txt"


def read_file(path: str | None, setting: str) -> str | None:
    """The content of the file that `setting` names; None if it names none."""
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {setting}={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {setting}={path}: it is not UTF-8 text") from error


def write_date(run_dir: Path) -> None:
    """Keep the day on which a run began: chat templates write dates, and a resumed run renders the same prompts."""
    run_dir.mkdir(parents=True, exist_ok=True)
    own = run_dir / f".{DATE}.{os.getpid()}"
    own.write_text(date.today().isoformat())
    with suppress(FileExistsError):
        os.link(own, run_dir / DATE)  # at once and with its content: others may be reading
    own.unlink()


def read_date(setting: str | None, run_dir: Path) -> date:
    """`data.date`, or the day on which the run began; today if there is neither. Raises UserError for anything else."""
    kept = run_dir / DATE
    text = kept.read_text() if setting is None and kept.is_file() else setting
    try:
        return date.today() if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"data.date={text} is no date: give YYYY-MM-DD") from error


def read_skip_ids(path: str | None) -> frozenset[str]:
    """Source ids of samples not to train on. Raises UserError for a line that is no id."""
    lines = (read_file(path, "data.skip_ids") or "").splitlines()
    ids = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    for number, name in ids.items():
        try:
            check_id(name, "source id")
        except UserError as error:
            raise UserError(f"data.skip_ids={path}, line {number}: {error}") from error
    return frozenset(ids.values())


def read_secret_file(path: str | None, setting: str) -> str | None:
    """A secret, without white space around it."""
    content = read_file(path, setting)
    if path is None or content is None:
        return None
    if Path(path).stat().st_mode & 0o004:
        log.warning("%s=%s can be read by everybody on this machine: chmod 600 %s", setting, path, path)
    return content.strip()


def read_api_key(target: "TargetConfig") -> str | None:
    """The key of capture servers."""
    key = read_secret_file(target.api_key_file, "target.api_key_file")
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise UserError(f"target.api_key_file={target.api_key_file} holds no key: it must be one line of printable ASCII")
    return key


def read_secret(store: "StoreConfig") -> str | None:
    """The secret of store=shared_dir."""
    return read_secret_file(store.secret_file, "store.secret_file")


def redis_address(settings: Any, secret_setting: str) -> RedisAddress:
    """The Redis of the settings `channel`, or of a command's arguments with the same names."""
    same = {field.name: getattr(settings, field.name) for field in fields(RedisAddress) if field.name != "password"}
    return RedisAddress(password=read_secret_file(settings.secret_file, secret_setting), **same)
