"""What a capture server is asked, and how its answer is read."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_dataflow.contracts import CapacityError, CaptureMismatchError, PeerGoneError, UserError
from lightning_dataflow.sglang_plugin.wire import PARAM, CaptureRequest, request_to_text


class CaptureFailedError(RuntimeError):
    """The server could not capture this prompt, though it and its store work."""


class ServerRefusalError(UserError):
    """This server cannot capture any prompt as it is set up."""


ERRORS: dict[Any, type[Exception]] = {
    "full": CapacityError,
    "mismatch": CaptureMismatchError,
    "refused": UserError,
    "store": PeerGoneError,
}


def generate_body(token_ids: Sequence[int], request: CaptureRequest) -> dict[str, Any]:
    """The body of a POST to `/generate`."""
    return {
        "rid": f"ldf-{secrets.token_hex(16)}",  # SGLang refuses a request id that it has seen
        "input_ids": list(token_ids),
        "return_hidden_states": True,
        "sampling_params": {
            "max_new_tokens": 1,
            "temperature": 0.0,
            "custom_params": {PARAM: request_to_text(request)},
        },
    }


def read_answer(output: Mapping[str, Any], server: str) -> dict[str, Any]:
    """The plugin's answer.

    Raises:
        PeerGoneError: the server lost its store, or dropped the request.
        CapacityError: the store is full.
        CaptureMismatchError: the server captured something else.
        CaptureFailedError: the server failed with this prompt.
        ServerRefusalError: the server does not have the plugin.
        UserError: the server refuses the request.
    """
    try:
        finish = output["meta_info"].get("finish_reason") or {}
        if finish.get("type") == "abort":
            raise PeerGoneError(f"{server} aborted the request: {finish.get('message')}")
        (text,) = output["meta_info"]["hidden_states"]
        answer = dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerRefusalError(
            f"{server} does not capture: run `pip install lightning-dataflow` in its environment, and look for "
            "'lightning_dataflow' in its log"
        ) from error
    if "error" not in answer:
        return answer
    raise ERRORS.get(answer["error"], CaptureFailedError)(f"{server}: {answer.get('message')}")
