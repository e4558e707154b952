"""References read from outside are input, not truth: bounded sizes, known types, ids that cannot name a path."""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

from lightning_dataflow.contracts.errors import UserError
from lightning_dataflow.contracts.records import (
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
MAX_RANK = 8
MAX_TEXT = 1024
MAX_FEATURES = 64
CACHED_SPECS, CACHED_CAPTURES = 1 << 15, 16
_CACHED_SPEC = {"name", "shape", "dtype", "target_repr"}
_NO_DEFAULT = object()
_ORIGIN_DEFAULTS = {"attempt": 0, "draft_weight_version": None}
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


def validate_ref(ref: SampleRef) -> SampleRef:
    """Return `ref` if every field is within bounds; raise UserError naming the field otherwise."""
    origin = ref.origin
    check_id(origin.sample_id, "sample_id")
    check_id(origin.run_id, "run_id")
    check_id(origin.source_task_id, "source_task_id")
    check_id(origin.source_id, "source_id")
    if ref.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"ref {origin.sample_id} has schema version {ref.schema_version}, this release reads {SCHEMA_VERSION}: "
            "capture again with this release"
        )
    if not isinstance(ref.generation, str) or not _GENERATION.fullmatch(ref.generation):
        raise UserError(f"ref {origin.sample_id} has generation {_short(ref.generation)}, expected attempt-nonce")
    _check_count(origin.num_tokens, MAX_TOKENS, f"num_tokens of {origin.sample_id}")
    if not 0 < len(ref.features) <= MAX_FEATURES:
        raise UserError(f"ref {origin.sample_id} has {len(ref.features)} features, expected 1 to {MAX_FEATURES}")
    _check_plain(ref)
    total = 0
    try:
        for name, spec in ref.features.items():
            shape = spec.shape
            if not isinstance(shape, tuple) or not shape or shape[0] != origin.num_tokens:
                raise UserError(
                    f"feature {name} has shape {_short(shape)}, its first size must be the {origin.num_tokens} tokens"
                )
            total += _feature_bytes(name, spec.name, spec.dtype, spec.target_repr, *shape)
    except (UserError, TypeError) as error:  # TypeError: a list where a name or number belongs
        raise UserError(f"ref {origin.sample_id}: {error}") from error
    if total != ref.num_bytes or total > MAX_SAMPLE_BYTES:
        raise UserError(
            f"ref {origin.sample_id} says {_short(ref.num_bytes)} bytes but its features hold {total} "
            f"(at most {MAX_SAMPLE_BYTES}): the ref is damaged, capture the sample again"
        )
    return ref


def ref_to_json(ref: SampleRef) -> dict[str, Any]:
    """Containers fit for JSON. Fields at their defaults are left out: the log holds one line a sample."""
    origin = {name: value for name, value in vars(ref.origin).items() if value != _ORIGIN_DEFAULTS.get(name, _NO_DEFAULT)}
    capture = ref.origin.capture
    origin["capture"] = {"layer_ids": capture.layer_ids, "norm": capture.norm, "hidden_size": capture.hidden_size}
    return {
        "origin": origin,
        "uri": ref.uri,
        "generation": ref.generation,
        "features": {name: _spec_to_json(spec) for name, spec in ref.features.items()},
        "num_bytes": ref.num_bytes,
        "schema_version": ref.schema_version,
    }


def ref_from_json(data: Any) -> SampleRef:
    """Rebuild and validate a ref from `json.loads` output. Raises UserError for anything malformed."""
    try:
        origin, capture = data["origin"], dict(data["origin"]["capture"])
        layer_ids = tuple(map(int, capture.pop("layer_ids")))
        origin = {**origin, "capture": _capture(layer_ids, **capture)}
        features = {name: _spec_from_json(spec) for name, spec in data["features"].items()}
        ref = SampleRef(**{**data, "origin": SampleOrigin(**origin), "features": features})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"not a sample reference ({error!r}): {_short(data)}") from error
    return validate_ref(ref)


def _spec_to_json(spec: FeatureSpec) -> dict[str, Any]:
    data: dict[str, Any] = {"name": spec.name, "shape": spec.shape, "dtype": spec.dtype}
    if spec.target_repr is not None:
        data["target_repr"] = spec.target_repr
    if spec.target_meta:
        data["target_meta"] = spec.target_meta
    return data


@lru_cache(CACHED_CAPTURES, typed=True)
def _capture(layer_ids: tuple[int, ...], norm: Any, hidden_size: int) -> CaptureSpec:
    """All samples of a run have one."""
    return CaptureSpec(layer_ids=layer_ids, norm=norm, hidden_size=hidden_size)


def _spec_from_json(data: Mapping[str, Any]) -> FeatureSpec:
    if data.keys() <= _CACHED_SPEC:
        return _spec(data["name"], data["dtype"], data.get("target_repr"), *data["shape"])
    return FeatureSpec(**{**data, "shape": tuple(data["shape"])})


@lru_cache(CACHED_SPECS, typed=True)
def _spec(name: str, dtype: str, target_repr: Any, *shape: int) -> FeatureSpec:
    """Features of one length recur in every sample of that length."""
    return FeatureSpec(name=name, shape=shape, dtype=dtype, target_repr=target_repr)


@lru_cache(CACHED_SPECS, typed=True)
def _feature_bytes(name: str, own_name: str, dtype: str, target_repr: Any, *shape: int) -> int:
    """Payload of a feature, once all that is said of it is within bounds."""
    check_id(name, "feature name")
    if own_name != name:
        raise UserError(f"feature {name} calls itself {_short(own_name)}: the ref is damaged")
    if dtype not in DTYPE_BYTES:
        raise UserError(f"feature {name} has dtype {_short(dtype)}, known: {', '.join(DTYPE_BYTES)}")
    if target_repr is not None and target_repr not in get_args(TargetRepr):
        raise UserError(f"feature {name} represents {_short(target_repr)}, known: {', '.join(get_args(TargetRepr))}")
    if len(shape) > MAX_RANK:
        raise UserError(f"feature {name} has shape {_short(shape)}, expected at most {MAX_RANK} sizes")
    for size in shape:
        _check_count(size, MAX_SAMPLE_BYTES, f"a size of feature {name}")
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _check_plain(ref: SampleRef) -> None:
    origin, capture = ref.origin, ref.origin.capture
    for what, value in (
        ("uri", ref.uri),
        ("target_model_version", origin.target_model_version),
        ("tokenizer_version", origin.tokenizer_version),
    ):
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
            raise UserError(f"{what} of {origin.sample_id} is {_short(value)}, expected up to {MAX_TEXT} characters")
    if not isinstance(origin.attempt, int) or not 0 <= origin.attempt < 10**9:
        raise UserError(f"attempt of {origin.sample_id} is {_short(origin.attempt)}, expected a whole number from 0")
    _check_count(capture.hidden_size, MAX_TOKENS, f"hidden_size of {origin.sample_id}")
    if capture.norm not in ("post", "pre") or not 0 < len(capture.layer_ids) <= MAX_FEATURES:
        raise UserError(f"capture of {origin.sample_id} is {_short(capture)}, expected layer ids and norm post or pre")


def _check_count(value: Any, limit: int, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise UserError(f"{what} is {_short(value)}, expected a whole number from 1 to {limit}")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        value = dict(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
