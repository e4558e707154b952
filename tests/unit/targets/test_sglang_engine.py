"""Target engine `sglang` without SGLang; tests/system/test_sglang.py has the rest."""

import json

import pytest
import torch

from lightning_dataflow.contracts import CapacityError, PeerGoneError, UserError, ref_to_json
from lightning_dataflow.services.sglang import LocalSGLang
from lightning_dataflow.sglang_plugin.wire import longest_prompt, token_digest
from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.targets.sglang_engine import take_all
from tests.records import make_origin
from tests.streams import make_tensors


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"meta_info": {"hidden_states": [json.dumps({"error": "full", "message": "no room"})]}}, CapacityError),
        ({"meta_info": {"hidden_states": [], "finish_reason": {"type": "abort", "message": "x"}}}, PeerGoneError),
        ({"meta_info": {"hidden_states": [[0.5]], "finish_reason": None}}, UserError),
    ],
)
def test_a_prompt_that_fails_leaves_nothing_of_the_others(fault, kind):
    store, batch, outputs = MemoryFeatureStore(), [], []
    for seq in range(3):
        tensors = make_tensors(seq)
        batch.append(tensors["input_ids"].tolist())
        answer = {"ref": ref_to_json(store.put(tensors, make_origin(seq))), "tokens": token_digest(batch[-1])}
        outputs.append({"meta_info": {"hidden_states": [json.dumps(answer)]}})

    def take(ref, token_ids):
        tensors, handle = store.get(ref)
        store.release(handle)
        return tensors["last_hidden_state"]

    with pytest.raises(kind):
        take_all([outputs[0], fault, outputs[2]], batch, take)
    assert store.health()["num_samples"] == 1, "what no answer names"
    assert torch.equal(*take_all(outputs[1:2], batch[1:2], take), make_tensors(1)["last_hidden_state"])


@pytest.mark.parametrize("limit", [None, "500", 0, 1, -1, True])
def test_a_server_that_does_not_say_what_it_takes(limit):
    with pytest.raises(UserError, match="the engine does not say what it takes"):
        longest_prompt({"max_req_input_len": limit}, "the engine")
    assert longest_prompt({"max_req_input_len": 501}, "the engine") == 500


@pytest.mark.parametrize("argument", ["--api-key", "--api-key=the", "--admin-api-key"])
def test_a_key_among_a_servers_arguments(tmp_path, argument):
    with pytest.raises(UserError, match=r"hold an API key.*set target\.api_key_file"):
        LocalSGLang("m", (1,), python="python3", store={}, folder=tmp_path, arguments=[argument, "the key"])
    assert list(tmp_path.iterdir()) == []
