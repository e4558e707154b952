"""References read from outside are input, not truth: bounded sizes, known types, ids that cannot name a path."""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeVar, cast, get_args

from lightning_dataflow.contracts.errors import UserError
from lightning_dataflow.contracts.records import (
    SCHEMA_VERSION,
    CaptureSpec,
    FeatureSpec,
    SampleOrigin,
    SampleRef,
    TargetRepr,
)

T = TypeVar("T")
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
CACHED_LAYOUTS, CACHED_SPECS, CACHED_CAPTURES = 1 << 13, 1 << 15, 16
_ORIGIN_DEFAULTS: dict[str, Any] = {"attempt": 0, "draft_weight_version": None}
_FIELDS: dict[type, tuple[frozenset[str], dict[str, Any]]] = {
    cls: (frozenset(field.name for field in fields(cls)), defaults)
    for cls, defaults in ((SampleOrigin, _ORIGIN_DEFAULTS), (SampleRef, {"schema_version": SCHEMA_VERSION}))
}
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
    _check_fields(ref)
    _check_capture(ref.origin.capture)
    return _check_total(ref, _payload(ref))


def _check_fields(ref: SampleRef) -> None:
    """All but the features."""
    origin = ref.origin
    check_id(origin.sample_id, "sample_id")
    check_id(origin.source_task_id, "source_task_id")
    check_id(origin.source_id, "source_id")
    try:
        _check_of_run(origin.run_id, origin.target_model_version, origin.tokenizer_version, ref.uri, ref.schema_version)
    except (UserError, TypeError) as error:  # TypeError: a list where a text belongs
        raise UserError(f"ref {origin.sample_id}: {error}") from error
    if not isinstance(ref.generation, str) or not _GENERATION.fullmatch(ref.generation):
        raise UserError(f"ref {origin.sample_id} has generation {_short(ref.generation)}, expected attempt-nonce")
    _check_count(origin.num_tokens, MAX_TOKENS, "num_tokens", origin.sample_id)
    if not 0 < len(ref.features) <= MAX_FEATURES:
        raise UserError(f"ref {origin.sample_id} has {len(ref.features)} features, expected 1 to {MAX_FEATURES}")
    if not isinstance(origin.attempt, int) or not 0 <= origin.attempt <= MAX_ATTEMPT:
        raise UserError(f"attempt of {origin.sample_id} is {_short(origin.attempt)}, expected a whole number from 0")


def _check_version(version: Any) -> None:
    if version != SCHEMA_VERSION:
        raise UserError(
            f"a sample reference has schema version {_short(version)}, this release reads {SCHEMA_VERSION}: capture again "
            "with this release"
        )


def _payload(ref: SampleRef) -> int:
    """Bytes of its features, once all that is said of them is within bounds."""
    origin, total = ref.origin, 0
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
    return total


def _check_total(ref: SampleRef, total: int) -> SampleRef:
    if total != ref.num_bytes or total > MAX_SAMPLE_BYTES:
        raise UserError(
            f"ref {ref.sample_id} says {_short(ref.num_bytes)} bytes but its features hold {total} "
            f"(at most {MAX_SAMPLE_BYTES}): the ref is damaged, capture the sample again"
        )
    return ref


def ref_to_json(ref: SampleRef) -> dict[str, Any]:
    """Containers fit for JSON. Fields at their defaults are left out: the log holds one line a sample.

    The capture is a line of text, `layer-layer-…/norm/hidden_size`. So are the features, `name/dtype/sizes=target_repr …`
    without the first size, which is the tokens; those that do not fit into a line are a mapping.
    """
    origin = dict(vars(ref.origin))
    for name, default in _ORIGIN_DEFAULTS.items():
        if origin[name] == default:
            del origin[name]
    if not ref.origin.metadata:
        del origin["metadata"]
    capture = ref.origin.capture
    origin["capture"] = _write_capture(capture.layer_ids, capture.norm, capture.hidden_size)
    return {
        "origin": origin,
        "uri": ref.uri,
        "generation": ref.generation,
        "features": _layout(ref) or {name: _spec_to_json(spec) for name, spec in ref.features.items()},
        "num_bytes": ref.num_bytes,
        "schema_version": ref.schema_version,
    }


def ref_from_json(data: Any) -> SampleRef:
    """Rebuild and validate a ref from `json.loads` output. Raises UserError for anything malformed."""
    try:
        told, features = data["origin"], data["features"]
        _check_version(data["schema_version"])
        capture = _read_capture(told["capture"])
        origin = _filled(SampleOrigin, {"metadata": {}, **told}, capture=capture)
        total = None
        if isinstance(features, str):
            _check_count(origin.num_tokens, MAX_TOKENS, "num_tokens", str(origin.sample_id))
            features, total = _read_layout(features, origin.num_tokens)
        else:
            features = {name: FeatureSpec(**{**spec, "shape": tuple(spec["shape"])}) for name, spec in features.items()}
        ref = _filled(SampleRef, data, origin=origin, features=features)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"not a sample reference ({error!r}): {_short(data)}") from error
    _check_fields(ref)
    return _check_total(ref, _payload(ref) if total is None else total)


def _layout(ref: SampleRef) -> str | None:
    """None where the features do not fit into a line."""
    told, num_tokens = [], ref.origin.num_tokens
    for name, spec in ref.features.items():
        shape = spec.shape
        if not shape or shape[0] != num_tokens or spec.name != name or spec.target_meta:
            return None
        told.append((name, spec.dtype, shape[1:], spec.target_repr))
    return _write_layout(tuple(told))


@lru_cache(CACHED_CAPTURES)
def _write_layout(told: tuple[tuple[str, str, tuple[int, ...], str | None], ...]) -> str:
    """All samples of a run have one."""
    words = (f"{name}/{dtype}/{'x'.join(map(str, sizes))}" + f"={what}" * bool(what) for name, dtype, sizes, what in told)
    return " ".join(words)


@lru_cache(CACHED_LAYOUTS, typed=True)
def _read_layout(layout: str, num_tokens: int) -> tuple[dict[str, FeatureSpec], int]:
    """Features and their payload in bytes. They recur in every sample of that length, and nobody changes them."""
    features, total = {}, 0
    for word in layout.split(" "):
        told, _, target_repr = word.partition("=")
        name, dtype, sizes = told.split("/")
        shape = (num_tokens, *(int(size) for size in sizes.split("x") if sizes))
        features[name] = FeatureSpec(name=name, shape=shape, dtype=dtype, target_repr=cast(Any, target_repr or None))
        total += _feature_bytes(name, name, dtype, target_repr or None, *shape)
    if len(features) != layout.count(" ") + 1:
        raise UserError(f"features {_short(layout)} name one twice: the ref is damaged")
    return features, total


def _filled(cls: type[T], told: Mapping[str, Any], **others: Any) -> T:
    """An instance of what is told and others. The constructor of a frozen class sets each field by a call of its own."""
    names, defaults = _FIELDS[cls]
    values = {**defaults, **told, **others}
    if len(values) != len(names) or not names.issuperset(values):
        raise TypeError(f"fields of {cls.__name__}: {', '.join(map(str, values.keys() ^ names))}")
    filled = object.__new__(cls)
    object.__setattr__(filled, "__dict__", values)
    return filled


def _spec_to_json(spec: FeatureSpec) -> dict[str, Any]:
    data: dict[str, Any] = {"name": spec.name, "shape": spec.shape, "dtype": spec.dtype}
    if spec.target_repr is not None:
        data["target_repr"] = spec.target_repr
    if spec.target_meta:
        data["target_meta"] = spec.target_meta
    return data


@lru_cache(CACHED_CAPTURES)
def _write_capture(layer_ids: tuple[int, ...], norm: str, hidden_size: int) -> str:
    return f"{'-'.join(map(str, layer_ids))}/{norm}/{hidden_size}"


@lru_cache(CACHED_CAPTURES, typed=True)
def _read_capture(text: str) -> CaptureSpec:
    """All samples of a run have one."""
    layer_ids, norm, hidden_size = text.split("/")
    spec = CaptureSpec(layer_ids=tuple(map(int, layer_ids.split("-"))), norm=cast(Any, norm), hidden_size=int(hidden_size))
    return _check_capture(spec)


def _check_capture(spec: CaptureSpec) -> CaptureSpec:
    _check_count(spec.hidden_size, MAX_TOKENS, "hidden_size", "a capture")
    if spec.norm not in ("post", "pre") or not 0 < len(spec.layer_ids) <= MAX_FEATURES:
        raise UserError(f"{_short(spec)} is no capture: it needs layer ids and norm post or pre")
    return spec


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
        _check_count(size, MAX_SAMPLE_BYTES, "a size", f"feature {name}")
    return math.prod(shape) * DTYPE_BYTES[dtype]


@lru_cache(CACHED_CAPTURES, typed=True)
def _check_of_run(run_id: Any, target: Any, tokenizer: Any, uri: Any, schema_version: Any) -> None:
    """What all samples of a run have."""
    check_id(run_id, "run_id")
    for what, value in (("uri", uri), ("target_model_version", target), ("tokenizer_version", tokenizer)):
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
            raise UserError(f"its {what} is {_short(value)}, expected up to {MAX_TEXT} characters")
    _check_version(schema_version)


def _check_count(value: Any, limit: int, what: str, whose: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise UserError(f"{what} of {whose} is {_short(value)}, expected a whole number from 1 to {limit}")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        value = dict(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
