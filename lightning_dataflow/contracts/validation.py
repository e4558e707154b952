"""References read from outside are input, not truth: bounded sizes, known types, ids that cannot name a path."""

import math
import re
from dataclasses import asdict
from typing import Any, get_args

from lightning_dataflow.contracts.errors import UserError
from lightning_dataflow.contracts.records import (
    OLD_SCHEMA_VERSION,
    SCHEMA_VERSION,
    CaptureSpec,
    FeatureSpec,
    SampleOrigin,
    SampleRef,
    TargetRepr,
)

DTYPE_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
MAX_SAMPLE_BYTES = 1 << 38
MAX_TOKENS = 1 << 24
MAX_ATTEMPT = 10**9 - 1
MAX_RANK = 8
MAX_TEXT = 1024
MAX_FEATURES = 64
_TARGET_REPRS = (None, *get_args(TargetRepr))
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:#-]{0,254}")
_GENERATION = re.compile(r"[0-9]{1,9}-[0-9a-f]{16,64}")


def check_id(value: Any, what: str) -> str:
    """Return `value` if it can serve as an id or a file name; raise UserError otherwise."""
    if not isinstance(value, str) or not _ID.fullmatch(value) or ".." in value:
        raise UserError(
            f"{what} {_short(value)} is not a valid id: use up to 255 letters, digits and . _ : # - "
            "without '..', starting with a letter or digit"
        )
    return value


def check_schema(version: Any, what: str, remedy: str) -> None:
    """Raise UserError, with the release that wrote it, where `what` has another schema version than this release."""
    if version != SCHEMA_VERSION:
        release = "0.1" if version == OLD_SCHEMA_VERSION else "another release"
        raise UserError(
            f"{what} has schema version {_short(version)} (of lightning_dataflow {release}), this release reads "
            f"{SCHEMA_VERSION}: {remedy}"
        )


def ref_to_json(ref: SampleRef) -> dict[str, Any]:
    """Containers fit for JSON, if the sample's metadata is."""
    return asdict(ref)


def ref_from_json(data: Any) -> SampleRef:
    """Rebuild and validate a ref from `json.loads` output. Raises UserError, which names the field, for anything else."""
    try:
        check_schema(data["schema_version"], "a sample reference", "capture again with this release")
        origin, features = data["origin"], data["features"]
        capture = origin["capture"]
        capture = CaptureSpec(**{**capture, "layer_ids": tuple(capture["layer_ids"])})
        features = {name: FeatureSpec(**spec | {"shape": tuple(spec["shape"])}) for name, spec in features.items()}
        ref = SampleRef(**data | {"origin": SampleOrigin(**origin | {"capture": capture}), "features": features})
        _check_origin(ref.origin)
        _check_features(ref)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"not a sample reference ({error!r}): {_short(data)}") from error
    return ref


def _check_origin(origin: SampleOrigin) -> None:
    for name in ("sample_id", "source_task_id", "source_id", "run_id"):
        check_id(getattr(origin, name), name)
    whose = f"of ref {origin.sample_id}"
    check_text(origin.target_model_version, f"target_model_version {whose}")
    check_text(origin.tokenizer_version, f"tokenizer_version {whose}")
    check_count(origin.attempt, 0, MAX_ATTEMPT, f"attempt {whose}")
    check_count(origin.num_tokens, 1, MAX_TOKENS, f"num_tokens {whose}")
    check_capture(origin.capture, whose)


def check_capture(capture: CaptureSpec, whose: str) -> None:
    """Raise UserError for a field that no capture has."""
    check_count(capture.hidden_size, 1, MAX_TOKENS, f"hidden_size {whose}")
    are_ids = 0 < len(capture.layer_ids) <= MAX_FEATURES and all(type(layer) is int for layer in capture.layer_ids)
    if capture.norm not in ("post", "pre") or not are_ids:
        raise UserError(f"capture {whose} is {_short(capture)}: it needs layer ids and norm post or pre")


def _check_features(ref: SampleRef) -> None:
    check_text(ref.uri, f"uri of ref {ref.sample_id}")
    if not _GENERATION.fullmatch(ref.generation):
        raise UserError(f"ref {ref.sample_id} has generation {_short(ref.generation)}, expected attempt-nonce")
    if not 0 < len(ref.features) <= MAX_FEATURES:
        raise UserError(f"ref {ref.sample_id} has {len(ref.features)} features, expected 1 to {MAX_FEATURES}")
    total = sum(_feature_bytes(name, spec, ref) for name, spec in ref.features.items())
    if total != ref.num_bytes or total > MAX_SAMPLE_BYTES:
        raise UserError(
            f"ref {ref.sample_id} says {_short(ref.num_bytes)} bytes but its features hold {total} "
            f"(at most {MAX_SAMPLE_BYTES}): the ref is damaged, capture the sample again"
        )


def _feature_bytes(name: str, spec: FeatureSpec, ref: SampleRef) -> int:
    """Payload of a feature, once its fields are within bounds."""
    shape, wrong = spec.shape, None
    if spec.name != name or not _ID.fullmatch(name) or ".." in name:
        wrong = f"has the name {_short(spec.name)}, expected a valid id, the same in both places"
    elif spec.dtype not in DTYPE_BYTES:
        wrong = f"has dtype {_short(spec.dtype)}, known: {', '.join(DTYPE_BYTES)}"
    elif spec.target_repr not in _TARGET_REPRS:
        wrong = f"represents {_short(spec.target_repr)}, known: {', '.join(get_args(TargetRepr))}"
    elif not 0 < len(shape) <= MAX_RANK or shape[0] != ref.origin.num_tokens:
        wrong = f"has shape {_short(shape)}, expected up to {MAX_RANK} sizes, the first of them the sample's tokens"
    elif not all(type(size) is int and 0 < size <= MAX_SAMPLE_BYTES for size in shape):
        wrong = f"has shape {_short(shape)}, expected whole numbers from 1 to {MAX_SAMPLE_BYTES}"
    if wrong is not None:
        raise UserError(f"feature {name} of ref {ref.sample_id} {wrong}: the ref is damaged, capture the sample again")
    return math.prod(shape) * DTYPE_BYTES[spec.dtype]


def check_text(value: Any, what: str) -> None:
    """Raise UserError unless `value` is a short text."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
        raise UserError(f"{what} is {_short(value)}, expected 1 to {MAX_TEXT} characters")


def check_count(value: Any, lowest: int, highest: int, what: str) -> None:
    """Raise UserError unless `value` is a whole number within these bounds."""
    if type(value) is not int or not lowest <= value <= highest:
        raise UserError(f"{what} is {_short(value)}, expected a whole number from {lowest} to {highest}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
