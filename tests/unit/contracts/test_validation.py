import json
import math
from dataclasses import replace

import pytest

from lightning_dataflow.contracts import (
    CaptureSpec,
    FeatureSpec,
    SampleOrigin,
    SampleRef,
    UserError,
    ref_from_json,
    ref_to_json,
)


def make_ref() -> SampleRef:
    origin = SampleOrigin(
        sample_id="run:00000001-p0",
        run_id="run",
        source_task_id="00000001-p0",
        source_id="00000001",
        capture=CaptureSpec(layer_ids=(1, 3, 4), norm="post", hidden_size=64),
        target_model_version="abc",
        tokenizer_version="def",
        num_tokens=5,
    )
    features = {"last_hidden_state": FeatureSpec(name="last_hidden_state", shape=(5, 64), dtype="bfloat16")}
    return SampleRef(
        origin=origin, uri="memory://x", generation="0-0123456789abcdef", features=features, num_bytes=5 * 64 * 2
    )


SPELLED_OUT = {"last_hidden_state": {"name": "last_hidden_state", "shape": [5, 64], "dtype": "bfloat16"}}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"shape": (5, 64)}, "x/bfloat16/64"),
        ({"shape": (5,)}, "x/bfloat16/"),
        ({"shape": (5, 3, 4), "target_repr": "hidden_state"}, "x/bfloat16/3x4=hidden_state"),
        ({"shape": (5, 64), "target_meta": {"vocab_map_version": "1"}}, None),
    ],
)
def test_round_trip_through_json(spec, text):
    size = 5 * 2 * math.prod(spec["shape"][1:])
    features = {"x": FeatureSpec(name="x", dtype="bfloat16", **spec)}
    ref = replace(make_ref(), features=features, num_bytes=size)
    data = json.loads(json.dumps(ref_to_json(ref)))
    assert isinstance(data["features"], dict) if text is None else data["features"] == text
    assert ref_from_json(data) == ref


def test_features_that_are_spelled_out():
    assert ref_from_json(json.loads(json.dumps(ref_to_json(make_ref()) | {"features": SPELLED_OUT}))) == make_ref()


def edited(path: str, value) -> dict:
    data = json.loads(json.dumps(ref_to_json(make_ref())))
    if path.startswith("features."):
        data["features"] = SPELLED_OUT
        data = json.loads(json.dumps(data))
    *parents, last = path.split(".")
    node = data
    for name in parents:
        node = node[name]
    node[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("origin.sample_id", "../../etc/passwd", "not a valid id"),
        ("origin.sample_id", "a..b", "not a valid id"),
        ("origin.sample_id", "x" * 300, "not a valid id"),
        ("origin.run_id", 7, "not a valid id"),
        ("generation", "latest", "expected attempt-nonce"),
        ("origin.num_tokens", 10**12, "num_tokens"),
        ("origin.num_tokens", True, "num_tokens"),
        ("num_bytes", 1, "the ref is damaged"),
        ("features.last_hidden_state.shape", [5, 2**60], "a size of feature"),
        ("features.last_hidden_state.shape", [5, -64], "a size of feature"),
        ("features.last_hidden_state.shape", [5] + [1] * 8, "at most 8 sizes"),
        ("features.last_hidden_state.shape", [1, 320], "first size must be the 5 tokens"),
        ("features.last_hidden_state.shape", [], "first size must be the 5 tokens"),
        ("uri", None, "ref run.* its uri is "),
        ("uri", "x" * 5000, "ref run.* its uri is "),
        ("origin.attempt", -1, "attempt of run"),
        ("origin.capture", "1-3-4/sideways/64", "norm post or pre"),
        ("origin.capture", "/post/64", "not a sample reference"),
        ("origin.capture", "1-3-4/post/0", "hidden_size of a capture is 0"),
        ("origin.capture", "1-3-4/post", "not a sample reference"),
        ("origin.capture", {"layer_ids": [1], "norm": "post", "hidden_size": 64}, "not a sample reference"),
        ("origin.surprise", 1, "not a sample reference"),
        ("features.last_hidden_state.dtype", "object", "known: bool"),
        ("features.last_hidden_state.dtype", ["bfloat16"], "unhashable type"),
        ("features.last_hidden_state.shape", [5, [64]], "unhashable type"),
        ("features.last_hidden_state.shape", [5, 64.0], "a size of feature"),
        ("features.last_hidden_state.target_repr", "text", "known: logits, pruned_logits, hidden_state"),
        ("features.last_hidden_state.surprise", 1, "not a sample reference"),
        ("features", {}, "expected 1 to 64"),
        ("features", "", "not a sample reference"),
        ("features", "last_hidden_state", "not a sample reference"),
        ("features", "a/b/bfloat16/64", "not a sample reference"),
        ("features", "last_hidden_state/bfloat16/64  x/bfloat16/64", "not a sample reference"),
        ("features", "last_hidden_state/bfloat16/6.4", "not a sample reference"),
        ("features", "../bfloat16/64", "feature name .* not a valid id"),
        ("features", "last_hidden_state/object/64", "known: bool"),
        ("features", "last_hidden_state/bfloat16/-64", "a size of feature"),
        ("features", "last_hidden_state/bfloat16/1x1x1x1x1x1x1x64", "at most 8 sizes"),
        ("features", "last_hidden_state/bfloat16/64=text", "known: logits, pruned_logits, hidden_state"),
        ("features", "last_hidden_state/bfloat16/65", "the ref is damaged"),
        ("features", "x/bfloat16/32 x/bfloat16/32", "name one twice"),
        ("schema_version", 99, "capture again"),
        ("surprise", 1, "not a sample reference"),
        ("origin", None, "not a sample reference"),
    ],
)
def test_a_foreign_ref_is_refused(path, value, message):
    ref_from_json(json.loads(json.dumps(ref_to_json(make_ref()))))  # what was valid once is no excuse
    with pytest.raises(UserError, match=message):
        ref_from_json(edited(path, value))


@pytest.mark.parametrize("data", [None, 3, [], "ref", {}])
def test_what_is_no_ref_at_all(data):
    with pytest.raises(UserError, match="not a sample reference"):
        ref_from_json(data)


def test_lists_in_a_spec_with_meta():
    data = edited("features.last_hidden_state.shape", [5, [64]])
    data["features"]["last_hidden_state"]["target_meta"] = {"vocab_map_version": "1"}
    with pytest.raises(UserError, match="ref run:00000001-p0: unhashable"):
        ref_from_json(data)


def test_refs_without_metadata_share_nothing():
    data = json.loads(json.dumps(ref_to_json(make_ref())))
    data["origin"].pop("metadata", None)
    one, other = ref_from_json(data), ref_from_json(data)
    assert one.origin.metadata == other.origin.metadata == {}
    assert one.origin.metadata is not other.origin.metadata


def test_a_ref_of_an_older_release_is_told_by_its_version():
    old = edited("origin.capture", {"layer_ids": [1], "norm": "post", "hidden_size": 64}) | {"schema_version": 1}
    with pytest.raises(UserError, match="has schema version 1, this release reads 2: capture again"):
        ref_from_json(old)
