"""Reads records from files, and from data sets that Hugging Face `datasets` can load."""

import glob
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from lightning_dataflow.contracts import UserError

KINDS = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".zstd")
SPLITS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}
SAVED_DATASETS = ("dataset_info.json", "dataset_dict.json")
"""What `save_to_disk` writes beside the data."""
LARGEST_RECORD = 32 << 20
"""Characters of one line."""
DEEPEST_RECORD = 100
"""Levels of lists and objects."""
TOO_DEEP = "lists or objects are nested too deeply"
INSTALL = "run `pip install 'lightning-dataflow[datasets]'`"


class Record(NamedTuple):
    """A record, or why it cannot be read.

    Attributes:
        where: file and line, for messages.
    """

    where: str
    data: Mapping[str, Any] | UserError


def read_records(
    path: str, *, split: str = "train", config: str | None = None, revision: str | None = None, setting: str = "data.path"
) -> Iterator[Record]:
    """The records of a file, of all files of a folder or that match a pattern, or of a Hugging Face data set.

    Files are JSONL, a JSON list, an object with a list named `split`, or Parquet; JSON also compressed by gzip or zstd.

    Args:
        config, revision: of a Hugging Face data set.
        setting: the name of the path in error messages.

    Raises:
        UserError: a file is missing, or is of another kind.
    """
    files = find_files(path, split)
    if files is None:
        return _read_dataset(path, split, config, revision, setting)
    if not files:
        raise UserError(
            f"{path} does not exist: {setting} takes a file, a folder, a pattern or the name of a Hugging Face data set"
        )
    return (record for file in files for record in _read_file(file, split, setting))


def find_files(path: str, split: str = "train") -> list[Path] | None:
    """The files that `path` names, sorted; None if it names a data set. Of a folder, those of `split`."""
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir() and not any((place / name).exists() for name in SAVED_DATASETS):
        inside = sorted(file for file in place.rglob("*") if file.is_file() and _is_data(file.relative_to(place)))
        return _of_split(inside, place, split) or None
    if glob.has_magic(path):
        return [Path(name) for name in sorted(glob.glob(path, recursive=True))]
    return [] if _kind(place)[0] in KINDS else None


def _is_data(file: Path) -> bool:
    """Hidden files belong to tools: caches of Hugging Face, git, what macOS writes."""
    return _kind(file)[0] in KINDS and not any(part.startswith(".") for part in file.parts)


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """All, unless their names say that they belong to different splits, as in data sets of Hugging Face."""

    def split_of(file: Path) -> str | None:
        words = re.split(r"[\W_]+", str(file.relative_to(folder)).lower())
        return next((name for name, aliases in SPLITS.items() if aliases & {*words}), None)

    if not any(map(split_of, files)):
        return files
    wanted = next((name for name, aliases in SPLITS.items() if split in aliases), split)
    return [file for file in files if split_of(file) == wanted]


def _kind(file: Path) -> tuple[str, str]:
    """(suffix without compression, suffix of the compression)."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _read_file(file: Path, split: str, setting: str) -> Iterator[Record]:
    kind, _ = _kind(file)
    if kind == ".parquet":
        yield from _read_parquet(file)
        return
    try:
        with _open(file) as lines:
            yield from _read_json(lines, file, split)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read prompt file {file} ({error.strerror}): correct {setting}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8") from error
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"cannot decompress {file} ({error}): fetch it again") from error


@contextmanager
def _open(file: Path) -> Iterator[IO[str]]:
    compression = _kind(file)[1]
    if compression in (".zst", ".zstd"):
        arrow = _import("pyarrow", file)
        with (
            arrow.CompressedInputStream(arrow.OSFile(str(file)), "zstd") as stream,
            io.TextIOWrapper(stream, "utf-8-sig") as text,
        ):
            yield text
        return
    with gzip.open(file) if compression else file.open("rb") as raw, io.TextIOWrapper(raw, "utf-8-sig") as text:
        yield text


def _read_json(lines: IO[str], file: Path, split: str) -> Iterator[Record]:
    """A record a line. A `.json` file whose first line is not one of several objects is one JSON value."""
    numbered = _numbered_lines(lines)
    head = list(islice(numbered, 1))
    if head and _is_object(head[0][1]):
        head += islice(numbered, 1)
    if _kind(file)[0] == ".json" and len(head) < 2:
        yield from _read_value("".join([*(line for _, line in head), lines.read()]), file, split)
        return
    for number, line in chain(head, numbered):
        where = f"{file}, line {number}"
        yield Record(where, _parse(line, where, "one JSON object a line"))


def _numbered_lines(lines: IO[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, cut where they are too long, numbered from 1."""
    number = 0
    while line := lines.readline(LARGEST_RECORD + 1):
        number += 1
        if line.strip():
            yield number, line
        while len(line) > LARGEST_RECORD and not line.endswith("\n"):  # the rest of a line that is too long
            line = lines.readline(LARGEST_RECORD + 1)


def _is_object(line: str) -> bool:
    return isinstance(_parse(line, "", ""), Mapping)


def _read_value(text: str, file: Path, split: str) -> Iterator[Record]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {_reason(error)}; expected a list of records, or one JSON object a line") from error
    if isinstance(value, Mapping):
        records = value.get(split)
        value = records if isinstance(records, list) else [value]
    if not isinstance(value, list):
        raise UserError(f"{file}: a JSON {type(value).__name__}; expected a list of records, or one JSON object a line")
    for number, record in enumerate(value, start=1):
        where = f"{file}, record {number}"
        yield Record(where, _check(record, where, "an object"))


def _parse(line: str, where: str, expected: str) -> Mapping[str, Any] | UserError:
    if len(line) > LARGEST_RECORD:
        return UserError(f"{where}: longer than {LARGEST_RECORD} characters; split or remove the record")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: {_reason(error)}; expected {expected}, correct or remove the line")
    return _check(record, where, expected)


def _check(record: Any, where: str, expected: str) -> Mapping[str, Any] | UserError:
    if not isinstance(record, Mapping):
        return UserError(f"{where}: a JSON {type(record).__name__}; expected {expected}")
    if _is_deep(record):
        return UserError(f"{where}: {TOO_DEEP}; expected {expected}, correct or remove it")
    return record


def _is_deep(record: Mapping[str, Any]) -> bool:
    """More levels than records have. Python's recursion, as in pickle between processes, has no room for many."""
    level: list[Any] = [record]
    for _ in range(DEEPEST_RECORD):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    if isinstance(error, RecursionError):
        return TOO_DEEP
    return f"a number has more than {sys.get_int_max_str_digits()} digits"


def _read_parquet(file: Path) -> Iterator[Record]:
    parquet = _import("pyarrow.parquet", file)
    try:
        table = parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{file}, row {number}", without_nulls(row))
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        raise UserError(f"{file} is not a Parquet file ({str(error).splitlines()[0]}): fetch it again") from error


def _read_dataset(name: str, split: str, config: str | None, revision: str | None, setting: str) -> Iterator[Record]:
    datasets = _import("datasets", name, setting)
    try:
        if Path(name).is_dir():
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(name, config, split=split, revision=revision)
    except (ValueError, OSError, ConnectionError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load data set {name}, split {split}: {reason}; set {setting} to a .jsonl file or a data set "
            "that this machine can reach"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield Record(f"{name}, record {number}", without_nulls(row))


def without_nulls(value: Any) -> Any:
    """Without the nulls with which Arrow fills keys that other rows have, within lists and objects.

    A message's `content` may be null.
    """
    if isinstance(value, Mapping):
        kept = ("content",) if "role" in value else ()
        return {key: without_nulls(item) for key, item in value.items() if item is not None or key in kept}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _import(module: str, needed_by: object, setting: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = (
            f"{setting}={needed_by} is no file, so it names a Hugging Face data set"
            if setting
            else f"cannot read {needed_by}"
        )
        raise UserError(f"{what}: {INSTALL}, or give a .jsonl file") from error
