"""Versions of a target's weights and tokenizer: features carry them, so that everybody can tell whose they are."""

import hashlib
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")


def model_fingerprint(folder: Path) -> str:
    """Hash of the config and of samples spread over every weight file: the whole of a large target takes minutes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for index in range(_SAMPLES):
                handle.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of the files that decide how text becomes tokens."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()[:16]
