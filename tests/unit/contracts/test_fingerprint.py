"""A fingerprint sees every tensor of a target's files, also in files that are not what they should be."""

import json
import struct
import time
from pathlib import Path
from random import Random

import pytest

from lightning_dataflow.contracts.fingerprint import PREFIX, early_fingerprint, model_fingerprint


def save(file: Path, tensors: dict[str, bytes], **fields: object) -> None:
    """A safetensors file; `fields` are of every tensor."""
    header, at = {}, 0
    for name, content in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [at, at + len(content)]} | fields
        at += len(content)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


def contents(num_tensors: int, size: int) -> dict[str, bytes]:
    random = Random(0)
    tensors = {f"layer.{i}.weight": random.randbytes(size) for i in range(num_tensors)}
    return tensors | {"norm": bytes(range(16)), "empty": b""}


def write(folder: Path, num_tensors: int = 64, size: int = 1 << 18) -> Path:
    """A target, most of whose tensors lie between the 16 places that earlier releases sampled."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save(folder / "model.safetensors", contents(num_tensors, size))
    return folder


def spans(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor lies in the file."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    return {name: tuple(8 + length + at for at in entry["data_offsets"]) for name, entry in header.items()}


def overwrite(file: Path, start: int, content: bytes) -> None:
    with file.open("r+b") as handle:
        handle.seek(start)
        handle.write(content)


def test_every_tensor_is_seen(tmp_path):
    folder = write(tmp_path / "target")
    file, before, early = folder / "model.safetensors", model_fingerprint(folder), early_fingerprint(folder)
    whole, unseen_before = file.read_bytes(), 0
    assert before.startswith(PREFIX) and model_fingerprint(folder) == before
    for start, stop in spans(file).values():
        if stop > start:
            overwrite(file, start, bytes(stop - start))
            assert model_fingerprint(folder) != before
            unseen_before += early_fingerprint(folder) == early
            file.write_bytes(whole)
    assert unseen_before > 20
    assert model_fingerprint(folder) == before


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_places_within_a_tensor(tmp_path, where):
    folder = write(tmp_path / "target", 4)
    file, before = folder / "model.safetensors", model_fingerprint(folder)
    start, stop = spans(file)["layer.2.weight"]
    at = {"start": start, "middle": (start + stop) // 2, "end": stop - 4}[where]
    overwrite(file, at, b"\x01\x02\x03\x04")
    assert model_fingerprint(folder) != before


def test_names_shapes_and_config_count(tmp_path):
    folder = write(tmp_path / "target", 2, 64)
    file, before = folder / "model.safetensors", model_fingerprint(folder)
    save(file, contents(2, 64), dtype="I8")
    assert model_fingerprint(folder) != before
    save(file, contents(2, 64))
    assert model_fingerprint(folder) == before
    (folder / "config.json").write_text('{"rope_theta": 1}')
    assert model_fingerprint(folder) != before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
        b"\xff" * 400,
        struct.pack("<Q", 1 << 62) + b"{}",
        *(
            struct.pack("<Q", len(text)) + text
            for text in (
                b'{"a": {"data_offsets": [0, 1000000000]}}',
                b'{"a": {"data_offsets": [0, Infinity]}}',
                b'{"a": {"data_offsets": [0, 1, 2]}}',
                b'{"a": 1}',
                b"[" * 100_000,
            )
        ),
    ],
    ids=range(9),
)
def test_files_without_a_header_are_sampled(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    found = set()
    for last in (b"", b"\x00", b"\x01"):
        (tmp_path / "model.safetensors").write_bytes(content + last)
        found.add(model_fingerprint(tmp_path))
    assert len(found) == 3


def test_bin_files_count_where_there_are_no_safetensors(tmp_path):
    folder = write(tmp_path / "target", 2, 64)
    before = model_fingerprint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"one")
    assert model_fingerprint(folder) == before
    (folder / "model.safetensors").unlink()
    first = model_fingerprint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"two")
    assert model_fingerprint(folder) != first


@pytest.mark.slow
def test_as_many_tensors_as_a_large_target_has(tmp_path):
    """A hundred thousand tensors of 1 MB, in sparse files."""
    (tmp_path / "config.json").write_text("{}")
    for shard in range(10):
        entries = {f"experts.{shard}.{i}.weight": {"data_offsets": [i << 20, (i + 1) << 20]} for i in range(10_000)}
        header = json.dumps(entries).encode()
        with (tmp_path / f"model-{shard:05d}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + (10_000 << 20))
    began = time.monotonic()
    model_fingerprint(tmp_path)
    assert time.monotonic() - began < 60
