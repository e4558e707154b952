"""How SGLang is asked for features, by whatever way, and how its answers are read."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_dataflow.contracts import (
    CapacityError,
    CaptureMismatchError,
    PeerGoneError,
    SampleRef,
    UserError,
    ref_from_json,
)
from lightning_dataflow.sglang_plugin.wire import (
    PARAM,
    CaptureRequest,
    ServerDescription,
    description_from_json,
    request_to_text,
    token_digest,
)


class CaptureFailedError(RuntimeError):
    """This prompt was not captured, though the server and its store are there."""


class ServerRefusalError(UserError):
    """A server cannot be used as it is, whatever it is asked."""


def fresh_rid() -> str:
    """SGLang refuses a name that it has seen."""
    return f"ldf-{secrets.token_hex(16)}"


def generate_arguments(token_ids: Sequence[int], request: CaptureRequest) -> dict[str, Any]:
    """Of `/generate`, or of the engine's method of that name."""
    return {
        "rid": fresh_rid(),
        "input_ids": list(token_ids),
        "return_hidden_states": True,
        "sampling_params": {
            "max_new_tokens": 1,
            "temperature": 0.0,
            "custom_params": {PARAM: request_to_text(request)},
        },
    }


def read_answer(output: Mapping[str, Any], who: str) -> dict[str, Any]:
    """What the plugin says.

    Raises:
        PeerGoneError: it lost its store, or dropped the request.
        CapacityError: the store is full.
        CaptureMismatchError: it captured something else.
        CaptureFailedError: it failed with this prompt.
        ServerRefusalError: it is not there.
        UserError: it refuses.
    """
    try:
        finish = output["meta_info"].get("finish_reason") or {}
        if finish.get("type") == "abort":
            raise PeerGoneError(f"{who} aborted the request: {finish.get('message')}")
        (answer,) = output["meta_info"]["hidden_states"]
        found = dict(json.loads(answer))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerRefusalError(
            f"{who} does not capture: run `pip install lightning-dataflow` in its environment, and look for "
            "'lightning_dataflow' in its log"
        ) from error
    if "error" not in found:
        return found
    kinds = {"full": CapacityError, "mismatch": CaptureMismatchError, "refused": UserError, "store": PeerGoneError}
    raise kinds.get(found["error"], CaptureFailedError)(f"{who}: {found.get('message')}")


def read_description(answer: Mapping[str, Any]) -> ServerDescription:
    """What a server says of itself."""
    return description_from_json(answer.get("server"))


def read_ref(answer: Mapping[str, Any], token_ids: Sequence[int], who: str) -> SampleRef:
    """Where features are. Raises CaptureMismatchError when they are of other tokens."""
    if answer.get("tokens") != token_digest(token_ids):
        raise CaptureMismatchError(f"{who} read other tokens than were sent")
    return ref_from_json(answer.get("ref"))
