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


@pytest.mark.parametrize(
    "spec",
    [
        {"shape": (5, 64)},
        {"shape": (5,)},
        {"shape": (5, 3, 4), "target_repr": "hidden_state"},
        {"shape": (5, 64), "target_meta": {"vocab_map_version": "1"}},
    ],
)
def test_round_trip_through_json(spec):
    size = 5 * 2 * math.prod(spec["shape"][1:])
    features = {"x": FeatureSpec(name="x", dtype="bfloat16", **spec)}
    ref = replace(make_ref(), features=features, num_bytes=size)
    assert ref_from_json(json.loads(json.dumps(ref_to_json(ref)))) == ref


def edited(path: str, value) -> dict:
    data = json.loads(json.dumps(ref_to_json(make_ref())))
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
        ("features.last_hidden_state.shape", [5, 2**60], r"has shape \(5, \d+\), expected whole numbers from 1 to"),
        ("features.last_hidden_state.shape", [5, -64], "expected whole numbers from 1 to"),
        ("features.last_hidden_state.shape", [5, 64.0], "expected whole numbers from 1 to"),
        ("features.last_hidden_state.shape", [5, [64]], "expected whole numbers from 1 to"),
        ("features.last_hidden_state.shape", [5] + [1] * 8, "up to 8 sizes, the first of them the sample's tokens"),
        ("features.last_hidden_state.shape", [1, 320], "the first of them the sample's tokens"),
        ("features.last_hidden_state.shape", [], "the first of them the sample's tokens"),
        ("features.last_hidden_state.name", "other", "the same in both places: the ref is damaged"),
        ("features.last_hidden_state.dtype", "object", "known: bool"),
        ("features.last_hidden_state.dtype", ["bfloat16"], "unhashable type"),
        ("features.last_hidden_state.target_repr", "text", "known: logits, pruned_logits, hidden_state"),
        ("features.last_hidden_state.surprise", 1, "not a sample reference"),
        ("features", {}, "expected 1 to 64"),
        ("features", {"../x": {"name": "../x", "shape": [5], "dtype": "int8"}}, "feature .* expected a valid id"),
        ("features", "last_hidden_state/bfloat16/64", "not a sample reference"),
        ("uri", None, "uri of ref run.* is "),
        ("uri", "x" * 5000, "uri of ref run.* is "),
        ("origin.attempt", -1, "attempt of ref run"),
        ("origin.capture.norm", "sideways", "norm post or pre"),
        ("origin.capture.layer_ids", [], "it needs layer ids"),
        ("origin.capture.layer_ids", ["1"], "it needs layer ids"),
        ("origin.capture.hidden_size", 0, "hidden_size of ref run:00000001-p0 is 0"),
        ("origin.capture", "1-3-4/post/64", "not a sample reference"),
        ("origin.surprise", 1, "not a sample reference"),
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


def test_a_ref_of_another_release_is_refused_by_its_version():
    with pytest.raises(UserError, match=r"schema version 2 \(of lightning_dataflow 0\.1\), this release reads 3: capture"):
        ref_from_json(edited("schema_version", 2))
