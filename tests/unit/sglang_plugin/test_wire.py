"""What clients and capture servers say to each other."""

import json
from dataclasses import replace

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.sglang_plugin.wire import (
    CaptureRequest,
    check_version,
    flag_problems,
    longest_prompt,
    request_from_text,
    request_to_text,
    start_advice,
    token_digest,
)

RIGHT = {
    "enable_return_aux_hidden_states": True,
    "aux_hidden_state_capture": "dflash",
    "return_aux_hidden_state_layer_ids": [1, 3, 4],
    "disable_radix_cache": True,
    "chunked_prefill_size": -1,
    "pp_size": 1,
    "cuda_graph_config": {"decode": {"backend": "full"}, "prefill": {"backend": "disabled"}},
}


@pytest.mark.parametrize("mask", [(0, 0, 1, 1, 0), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0), (1, 0, 1, 0, 1)])
def test_a_request_survives_the_way(mask):
    request = CaptureRequest(store_id="run", sample_id="run:p0-3", loss_mask=mask)
    assert request_from_text(request_to_text(request), 5) == request
    request = replace(request, attempt=2, features=("aux_hidden_states",), dry_run=True)
    assert request_from_text(request_to_text(request), 5) == request


def test_a_request_stays_small_whatever_the_length():
    mask = (0,) * 50_000 + (1,) * 50_000
    assert len(request_to_text(CaptureRequest(store_id="run", sample_id="run:1", loss_mask=mask))) < 200


GOOD = json.loads(request_to_text(CaptureRequest(store_id="run", sample_id="run:1", loss_mask=(0, 0, 1, 1, 1))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "../etc"}, "not a valid id"),
        ({"sample": "a/b"}, "not a valid id"),
        ({"sample": 3}, "not a valid id"),
        ({"attempt": -1}, "whole numbers"),
        ({"mask": [2, "3"]}, "whole numbers"),
        ({"mask": [2, 1 << 60]}, "whole numbers"),
        ({"mask": [2, 2]}, "has 4 entries, the server read 5 tokens"),
        ({"features": ["logits"]}, r"features=\['logits'\] of run:1: a server captures aux_hidden_states and last"),
        ({"features": []}, r"features=\[\]"),
        ({"features": [["logits"]]}, "not a capture request"),
        ({"protocol": 9}, "protocol 9"),
    ],
)
def test_a_request_is_input_not_truth(changes, message):
    with pytest.raises(UserError, match=message):
        request_from_text(json.dumps(GOOD | changes), 5)


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_request_has_all_fields(field):
    with pytest.raises(UserError, match="not a capture request"):
        request_from_text(json.dumps({name: value for name, value in GOOD.items() if name != field}), 5)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", 7, None, '{"protocol": 3}', "[" * 100_000])
def test_what_is_no_request(text):
    with pytest.raises(UserError, match="not a capture request"):
        request_from_text(text, 5)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({}, None),
        ({"chunked_prefill_size": None}, None),
        ({"enable_return_aux_hidden_states": False}, "--enable-return-aux-hidden-states --speculative-algorithm DFLASH"),
        ({"aux_hidden_state_capture": "eagle3"}, "--enable-return-aux-hidden-states --speculative-algorithm DFLASH"),
        ({"return_aux_hidden_state_layer_ids": None}, "--return-aux-hidden-state-layer-ids"),
        ({"disable_radix_cache": False}, "--disable-radix-cache"),
        ({"chunked_prefill_size": 2048}, "--chunked-prefill-size -1"),
        ({"pp_size": 2}, "--pp-size 1"),
    ],
)
def test_missing_flags_are_named(changes, flag):
    assert flag_problems(RIGHT | changes) == ([flag] if flag else [])


def test_the_advice_is_a_whole_command():
    advice = start_advice("models/my target", (1, 3, 4))
    assert (
        "LIGHTNING_DATAFLOW_SERVER_FILE=server.json python -m sglang.launch_server --model-path 'models/my target'"
        in advice
    )
    assert "--return-aux-hidden-state-layer-ids 1 3 4 --disable-radix-cache --chunked-prefill-size -1" in advice


@pytest.mark.parametrize(
    ("version", "good"), [("0.5.23", True), ("0.5.24.post1", True), ("0.5.22", False), ("0.6.0", False)]
)
def test_the_supported_range(version, good):
    if good:
        check_version(version)
    else:
        with pytest.raises(UserError, match=r"needs sglang>=0\.5\.23,<0\.6"):
            check_version(version)


def test_digests_tell_prompts_apart():
    assert len({token_digest(ids) for ids in ([], [0], [0, 0], [256], [1, 0], [0, 1])}) == 6


@pytest.mark.parametrize("limit", [None, "500", 0, 1, -1, True])
def test_a_server_that_does_not_say_what_it_takes(limit):
    with pytest.raises(UserError, match="the server does not say what it takes"):
        longest_prompt({"max_req_input_len": limit}, "the server")
    assert longest_prompt({"max_req_input_len": 501}, "the server") == 500
