"""Cards and references that no process of the run wrote: one line names the field, and no memory is taken for them."""

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lightning_dataflow.contracts import FeatureSpec, UserError
from lightning_dataflow.contracts.validation import DTYPE_BYTES
from lightning_dataflow.control.log import MAX_LINE_BYTES
from lightning_dataflow.data import FeatureCard
from lightning_dataflow.data.announcement import Announcement
from lightning_dataflow.data.offline import MANIFEST, REFS, OfflineSource, write_manifest
from lightning_dataflow.stores import MemoryFeatureStore, SharedDirFeatureStore
from lightning_dataflow.stores.card import FILE
from tests.records import make_origin
from tests.streams import CARD, make_tensors

ANNOUNCED = {"num_samples": 9, "seed": 0, "token_counts": {3: 4}, "capture_batch_size": 2, "largest_bytes": 64}


def announced() -> dict:
    return json.loads(json.dumps(Announcement(run_id="run", card=CARD, **ANNOUNCED).to_json()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run_id", "../x"),
        ("num_samples", 1 << 60),
        ("num_samples", 2.5),
        ("capture_batch_size", 0),
        ("largest_bytes", -1),
        ("seed", "0"),
        ("token_counts", {"-1": 1}),
        ("token_counts", {"99999999": 1}),
        ("token_counts", {"1": -1}),
    ],
)
def test_an_announcement_is_checked(name, value):
    with pytest.raises(UserError, match=f"what x announces is damaged .*{name}"):
        Announcement.from_json(announced() | {name: value}, "x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("features", []),
        ("features", ["a/b"]),
        ("features", ["x"] * 100),
        ("dtype", "complex1024"),
        ("dtype", ["float32"]),
        ("max_num_tokens", 1 << 40),
        ("max_num_tokens", True),
        ("prompts_version", "\x1b[2J" * 1000),
        ("target_model_version", None),
        ("skipped", {"\x1b[2J": -1}),
        ("skipped", []),
    ],
)
def test_a_card_is_checked(name, value):
    with pytest.raises((UserError, AttributeError, TypeError)) as error:
        FeatureCard.from_json(json.loads(json.dumps(asdict(CARD))) | {name: value})
    if isinstance(error.value, UserError):
        assert {"features": "feature"}.get(name, name) in str(error.value)
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "change", [{"hidden_size": 1 << 33}, {"layer_ids": [True]}, {"layer_ids": list(range(99))}, {"norm": "x"}]
)
def test_the_capture_of_a_card_is_checked(change):
    data = json.loads(json.dumps(asdict(CARD)))
    with pytest.raises(UserError, match="of the card"):
        FeatureCard.from_json(data | {"capture": data["capture"] | change})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("{", "not valid JSON"),
        ("[]", "is damaged"),
        ('{"schema_version": [1]}', "schema"),
    ],
)
def test_a_manifest_is_bounded(tmp_path, text, reason):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=reason):
        OfflineSource(tmp_path)


def captured(folder: Path) -> None:
    """A finished capture of two samples."""
    store = SharedDirFeatureStore(folder, retain=True)
    refs = [store.put(make_tensors(index), make_origin(index)) for index in range(2)]
    write_manifest(folder, refs, CARD, torch.zeros(8, dtype=torch.int64))


def test_a_manifest_that_is_no_text(tmp_path):
    captured(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=f"{MANIFEST} is not valid JSON"):
        OfflineSource(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"\xff", "not valid JSON"), (b"x" * (MAX_LINE_BYTES + 1), "the limit is"), (b"", "not valid JSON")],
    ids=range(3),
)
def test_a_line_of_the_refs_that_is_none(tmp_path, line, reason):
    captured(tmp_path)
    path = tmp_path / REFS
    whole = path.read_bytes()
    assert len(OfflineSource(tmp_path).refs) == 2
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(UserError, match=rf"{REFS}, line 3: .*{reason}"):
        OfflineSource(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, REFS, FILE])
def test_a_file_of_a_terabyte_is_not_read_whole(tmp_path, name):
    captured(tmp_path)
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(UserError, match="the limit is"):
        OfflineSource(tmp_path)


def claims(shapes: dict[str, tuple[int, ...]], dtype: str | None = None, num_tokens: int = 4):
    """A ref like those of CARD, with other shapes."""
    ref = MemoryFeatureStore().put(make_tensors(2), make_origin(2))
    features = {name: replace(spec, shape=shapes.get(name, spec.shape)) for name, spec in ref.features.items()}
    if dtype is not None:
        features["last_hidden_state"] = replace(features["last_hidden_state"], dtype=dtype)
    num_bytes = sum(math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in features.values())
    return replace(ref, features=features, num_bytes=num_bytes, origin=replace(ref.origin, num_tokens=num_tokens))


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        (claims({"aux_hidden_states": (4, 1 << 33)}), "aux_hidden_states of [4, 8589934592] float32, expected: 2 columns"),
        (claims({"last_hidden_state": (4, 1 << 29)}), "last_hidden_state of [4, 536870912]"),
        (claims({"input_ids": (4, 1 << 29)}), "input_ids of [4, 536870912], expected is one value a token"),
        (claims({}, dtype="float64"), "expected: 2 columns of float32"),
        (claims({}, num_tokens=1 << 24), "has 16777216 tokens, the longest sample has 4"),
        (replace(claims({}), features={"x": FeatureSpec(name="x", shape=(4,), dtype="float32")}), "has the features x"),
    ],
)
def test_a_ref_is_compared_with_the_card(ref, reason):
    with pytest.raises(UserError) as error:
        CARD.check_ref(ref)
    assert reason in str(error.value)


def test_the_refs_of_a_run_pass():
    for seq in range(3):
        CARD.check_ref(MemoryFeatureStore().put(make_tensors(seq), make_origin(seq)))
