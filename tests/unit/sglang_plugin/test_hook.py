"""What the plugin does that needs no SGLang; tests/system/sglang has the rest."""

import json
from types import SimpleNamespace

import pytest

from lightning_dataflow.contracts import BrokenFeaturesError, CapacityError, UserError
from lightning_dataflow.sglang_plugin.hook import _answer as answer, append_prefill_hidden_states, error_to_text
from lightning_dataflow.sglang_plugin.wire import MAX_ANSWER_BYTES, PARAM, CaptureRequest, request_to_text
from lightning_dataflow.stores import StoreUnavailableError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BrokenFeaturesError("aux_hidden_states (layer 3)"), "not_finite"),
        (CapacityError("full"), "full"),
        (UserError("flags"), "refused"),
        (PermissionError("the secret does not match"), "refused"),
        (StoreUnavailableError("gone"), "store"),
        (RuntimeError("computed 1 of 6"), "failed"),
        (OSError("disk"), "failed"),
        (KeyError(), "failed"),
    ],
)
def test_only_a_store_that_is_gone_is_told_as_such(error, kind):
    assert json.loads(error_to_text(error))["error"] == kind


@pytest.mark.parametrize("letter", ["a", "ä", "漢", "🦙", '"', "\x00"])
def test_an_answer_stays_small_in_any_language(letter):
    text = error_to_text(UserError(letter * 5000))
    assert len(text.encode()) < MAX_ANSWER_BYTES
    assert set(json.loads(text)["message"]) == {letter}


@pytest.mark.parametrize(("params", "states"), [(None, True), ({}, True), ({PARAM: "x"}, False), ({PARAM: "x"}, "last")])
def test_a_request_that_does_not_want_all_its_states_is_sglangs_own(params, states):
    req = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=params), return_hidden_states=states)
    assert append_prefill_hidden_states(lambda processor, **call: 7, None, req=req) == 7


def test_several_answers_to_one_prompt_are_refused():
    text = request_to_text(CaptureRequest(store_id="run", sample_id="run:1", loss_mask=(1, 1)))
    req = SimpleNamespace(sampling_params=SimpleNamespace(n=2), origin_input_ids=[1, 2])
    found = json.loads(answer(text, req, None, range(2), None))
    assert (found["error"], found["message"]) == ("refused", "a prompt is captured once, not n=2 times: set n=1")
