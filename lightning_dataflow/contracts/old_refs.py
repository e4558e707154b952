"""References of release 0.1, which folders that it captured hold."""

from collections.abc import Mapping
from typing import Any

from lightning_dataflow.contracts.errors import UserError
from lightning_dataflow.contracts.records import SCHEMA_VERSION, SampleRef
from lightning_dataflow.contracts.validation import ref_from_json


def ref_from_old_json(data: Any) -> SampleRef:
    """As `ref_from_json`, of release 0.1. Raises UserError for anything malformed.

    There a capture is `layer-layer-…/norm/hidden_size`, and the features are `name/dtype/sizes=target_repr …`, without
    the first size, which is the tokens; or a mapping as today.
    """
    try:
        origin, features = data["origin"], data["features"]
        layer_ids, norm, hidden_size = origin["capture"].split("/")
        capture = {"layer_ids": list(map(int, layer_ids.split("-"))), "norm": norm, "hidden_size": int(hidden_size)}
        if isinstance(features, str):
            features = dict(_feature(word, origin["num_tokens"]) for word in features.split(" "))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"not a sample reference of release 0.1 ({error!r}): {str(data)[:80]}") from error
    new = {"schema_version": SCHEMA_VERSION, "origin": {**origin, "capture": capture}, "features": features}
    return ref_from_json({**data, **new})


def _feature(word: str, num_tokens: int) -> tuple[str, Mapping[str, Any]]:
    text, _, target_repr = word.partition("=")
    name, dtype, sizes = text.split("/")
    shape = [num_tokens, *(int(size) for size in sizes.split("x") if size)]
    return name, {"name": name, "shape": shape, "dtype": dtype, "target_repr": target_repr or None}
