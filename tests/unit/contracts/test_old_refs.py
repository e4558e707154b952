"""References as release 0.1 wrote them."""

import json

import pytest

from lightning_dataflow.contracts import CaptureSpec, FeatureSpec, UserError
from lightning_dataflow.contracts.old_refs import ref_from_old_json

LINE = (
    '{"origin": {"sample_id": "run:00000001-p0", "run_id": "run", "source_task_id": "00000001-p0", '
    '"source_id": "00000001", "capture": "1-3-4/post/64", "target_model_version": "abc", "tokenizer_version": "def", '
    '"num_tokens": 5, "metadata": {"pass": 1}}, "uri": "memory://x", "generation": "0-0123456789abcdef", "features": '
    '"last_hidden_state/bfloat16/64 loss_mask/uint8/ x/bfloat16/3x4=hidden_state", "num_bytes": 765, "schema_version": 2}'
)


def test_a_line_of_release_0_1():
    ref = ref_from_old_json(json.loads(LINE))
    assert ref.origin.capture == CaptureSpec(layer_ids=(1, 3, 4), norm="post", hidden_size=64)
    assert (ref.origin.attempt, ref.origin.metadata, ref.schema_version) == (0, {"pass": 1}, 3)
    assert ref.features == {
        "last_hidden_state": FeatureSpec(name="last_hidden_state", shape=(5, 64), dtype="bfloat16"),
        "loss_mask": FeatureSpec(name="loss_mask", shape=(5,), dtype="uint8"),
        "x": FeatureSpec(name="x", shape=(5, 3, 4), dtype="bfloat16", target_repr="hidden_state"),
    }


def test_features_that_are_spelled_out():
    features = {"x": {"name": "x", "shape": [5, 64], "dtype": "bfloat16", "target_meta": {"vocab_map_version": "1"}}}
    ref = ref_from_old_json(json.loads(LINE) | {"features": features, "num_bytes": 640})
    assert ref.features["x"].target_meta == {"vocab_map_version": "1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "x/bfloat16"}, "not a sample reference of release 0.1"),
        ({"features": "x/bfloat16/64=text"}, "known: logits, pruned_logits, hidden_state"),
        ({"num_bytes": 1}, "the ref is damaged"),
        ({"origin": {}}, "not a sample reference of release 0.1"),
    ],
)
def test_a_damaged_one_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ref_from_old_json(json.loads(LINE) | changes)
