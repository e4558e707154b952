"""Reads records from a JSONL file, or from a data set that Hugging Face `datasets` can load."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError

Record = Mapping[str, Any]


def read_records(path: str, *, split: str = "train", setting: str = "data.path") -> Iterator[tuple[int, Record]]:
    """Yield (number, record) from a `.jsonl` file (numbers are lines, from 1) or from a `datasets` name or folder.

    Args:
        setting: the name of the path in error messages.

    Raises:
        UserError: the file is missing, or a line, which is named, is not a JSON object.
    """
    if path.endswith((".jsonl", ".json")) or Path(path).is_file():
        return _read_jsonl(Path(path), setting)
    return _read_dataset(path, split, setting)


def _read_jsonl(path: Path, setting: str) -> Iterator[tuple[int, Record]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line, path, number)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"no prompt file {path}: set {setting} to a .jsonl file or a Hugging Face data set") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8") from error


def _parse(line: str, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}: {_reason(error)}; expected one JSON object a line, correct or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number}: a JSON {type(record).__name__}; expected one JSON object a line")
    return record


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return f"a number has more than {sys.get_int_max_str_digits()} digits"


def _read_dataset(name: str, split: str, setting: str) -> Iterator[tuple[int, Record]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{setting}={name} is not a .jsonl file, so it names a Hugging Face data set: "
            "run `pip install 'lightning-dataflow[datasets]'`, or give a .jsonl file"
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except (ValueError, OSError, ConnectionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot load data set {name}, split {split}: {reason}; set {setting} to a .jsonl file or a data set "
            "that this machine can reach"
        ) from error
    yield from enumerate(rows, start=1)
