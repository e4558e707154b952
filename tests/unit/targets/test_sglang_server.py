"""What the client of capture servers asks, and what it checks of an answer; tests/system/sglang has the real one."""

from dataclasses import replace

import pytest
import torch

from lightning_dataflow.contracts import CapacityError, CaptureMismatchError, PeerGoneError, UserError
from lightning_dataflow.targets.sglang_http import CaptureFailedError
from tests.unit.targets.capture_servers import OTHER_LAYERS, PROMPTS, answer_with, ask, origin, origin_with, ref_with

pytestmark = pytest.mark.integration  # servers that come, go and hang


def test_features_come_by_way_of_the_store(connect, servers, store, target):
    engine = connect()
    assert (engine.dtype, engine.info.max_position_embeddings) == ("float32", 500)
    for found, want in zip(engine.capture(PROMPTS), target.capture(PROMPTS), strict=True):
        for name, tensor in want.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4)
    assert all(server.num_captures for server in servers)
    rids = [rid for server in servers for rid in server.rids]
    assert len(rids) == len(set(rids)) == len(PROMPTS) + 4
    assert store.health()["num_samples"] == 0


def test_log_probabilities_of_a_prompt(connect, servers, store, target):
    engine, ids = connect(features=("aux_hidden_states",)), [5, 6, 7]
    for answer in ({}, {"input_token_logprobs": [[None, 5, None]]}, {"input_token_logprobs": [None, None, None]}):
        servers[0].logprobs = answer
        assert engine.logprobs_of(ids)[1] is None
    servers[0].logprobs = {"input_token_logprobs": [[None, 5, None], [-1.5, 6, None], [-2, 7, None]]}
    last, logprobs = engine.logprobs_of(ids)
    assert logprobs == [-1.5, -2.0]
    torch.testing.assert_close(last, target.capture([ids])[0]["last_hidden_state"], atol=1e-4, rtol=1e-4)
    assert engine.features == ("aux_hidden_states",) and store.health()["num_samples"] == 0


def test_a_prompt_that_fails_leaves_nothing_of_the_others_in_the_store(connect, servers, store):
    engine = connect(urls=[servers[0].url], in_flight=1)
    servers[0].alter = lambda answer: (
        {"error": "failed", "message": "CUDA error"} if answer["ref"]["origin"]["num_tokens"] == 5 else answer
    )
    failed = PROMPTS[1]
    assert len(failed) == 5
    with pytest.raises(CaptureFailedError, match="CUDA error"):
        engine.capture([PROMPTS[0], failed, PROMPTS[2]])
    engine.stop_waiting()
    engine._executor.shutdown()
    assert store.health()["num_samples"] == 1, "the features that no answer names"


@pytest.mark.parametrize(
    ("alter", "kind", "message"),
    [
        (answer_with(tokens="00"), CaptureMismatchError, "read other tokens"),
        (ref_with(uri="mooncake://other"), CaptureMismatchError, "has another store"),
        (origin_with(capture=OTHER_LAYERS), CaptureMismatchError, "has other layers, norm or width"),
        (
            origin_with(capture={"layer_ids": [1, 3, 4], "norm": "pre", "hidden_size": 64}),
            CaptureMismatchError,
            "has other layers",
        ),
        (origin_with(target_model_version="f" * 16), CaptureMismatchError, "has other weights"),
        (origin_with(sample_id="run:9"), CaptureMismatchError, "has another sample"),
        (ref_with(num_bytes=7), UserError, "says 7 bytes"),
        (answer_with(error="full", message="no room"), CapacityError, "no room"),
        (answer_with(error="refused", message="flags"), UserError, "flags"),
        (answer_with(error="store", message="gone"), PeerGoneError, "gone"),
        (answer_with(error="failed", message="1 of 6"), CaptureFailedError, "1 of 6"),
        (answer_with(error="of tomorrow", message="something"), CaptureFailedError, "something"),
        (answer_with(error=["full"], message="a list"), CaptureFailedError, "a list"),
    ],
)
def test_an_answer_is_input_not_truth(connect, servers, alter, kind, message):
    engine = connect(urls=[servers[0].url])
    servers[0].alter = alter
    with pytest.raises(kind, match=message):
        ask(engine)


def test_features_of_another_shape(connect, servers, monkeypatch, target):
    engine = connect(urls=[servers[0].url])
    monkeypatch.setattr(servers[0], "target", _Short(target))
    with pytest.raises(UserError, match="the first of them the sample's tokens"):
        ask(engine)


class _Short:
    """Drops the first token, as a prefix cache does."""

    def __init__(self, target):
        self.info, self.capture_spec, self._target = target.info, target.capture_spec, target

    def capture(self, batch):
        return [{name: one[1:] for name, one in found.items()} for found in self._target.capture(batch)]


def test_refs_carry_our_names(connect):
    engine = connect()
    mine = replace(origin(engine, [1, 2, 3]), source_id="prompt-7", metadata={"pass": 2})
    assert engine.capture_ref([1, 2, 3], [0, 1, 1], mine).origin == mine
