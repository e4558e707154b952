"""Versions of a target's weights and tokenizer: features carry them, so that everybody can tell whose they are."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

PREFIX = "2-"
"""Of fingerprints that sample every tensor; earlier releases sampled 16 places of a file, and wrote no prefix."""
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
_TENSOR_SAMPLE_BYTES = 1 << 12
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""
_READERS = 8
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")


def model_fingerprint(folder: Path) -> str:
    """Hash of the config, and of the sizes, headers and samples of all weight files: the whole of a large target takes
    minutes.

    Of each tensor in a safetensors file, 4 KB at its start, middle and end are read, small tensors whole. Files without
    such a header (`.bin`, read where there are no safetensors; or damaged ones) are sampled at 16 places.

    It cannot see a change that lies between the samples of a tensor of more than 12 KB, such as one row of an embedding,
    nor one between the 16 places of a file without a header. A change that spreads over a tensor is seen: another training
    step, a merged adapter, another rounding, a tensor of zeros.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    with ThreadPoolExecutor(_READERS) as readers:
        for file, samples in zip(files, readers.map(_file_digest, files), strict=True):
            digest.update(f"{file.name} {file.stat().st_size}".encode() + samples)
    return PREFIX + digest.hexdigest()[:16]


def early_fingerprint(folder: Path) -> str:
    """The fingerprint of earlier releases, which folders of features and checkpoints that they wrote carry."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as handle:
            _spread(digest, handle, file.stat().st_size)
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of the files that decide how text becomes tokens."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()[:16]


def _file_digest(file: Path) -> bytes:
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb", buffering=_TENSOR_SAMPLE_BYTES) as handle:
        header = handle.read(8)
        length = int.from_bytes(header, "little")
        text = handle.read(length) if length <= min(_MAX_HEADER_BYTES, size - 8) else b""
        try:
            spans = _spans(text, size - 8 - length)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):  # no such header
            _spread(digest, handle, size)
            return digest.digest()
        digest.update(header + text)
        for start, stop in _merged(_samples(spans)):
            handle.seek(8 + length + start)
            digest.update(handle.read(stop - start))
    return digest.digest()


def _spans(header: bytes, size: int) -> list[tuple[int, int]]:
    """Where each tensor lies behind the header, ascending. Raises ValueError, or another error, for what is no header."""
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    spans = sorted((int(start), int(stop)) for start, stop in (entry["data_offsets"] for entry in entries.values()))
    if any(not 0 <= start <= stop <= size for start, stop in spans):
        raise ValueError("a tensor outside the file")
    return spans


def _samples(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, stop in spans:
        last = max(start, stop - _TENSOR_SAMPLE_BYTES)
        for begin in (start, (start + last) // 2, last):
            yield begin, min(stop, begin + _TENSOR_SAMPLE_BYTES)


def _merged(samples: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Samples that touch, as one tensor's end and the next one's start do, are read at once."""
    start = stop = 0
    for begin, end in samples:
        if begin > stop or end - start > _SAMPLE_BYTES:
            yield start, stop
            start = max(begin, stop)
        stop = max(stop, end)
    yield start, stop


def _spread(digest: "hashlib._Hash", handle: BinaryIO, size: int) -> None:
    for index in range(_SAMPLES):
        handle.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
        digest.update(handle.read(_SAMPLE_BYTES))
