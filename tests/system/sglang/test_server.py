"""Stock SGLang servers and a real Mooncake: what they capture, what they refuse, and what else they serve."""

import json
import subprocess
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
import torch

from lightning_dataflow.contracts import CapacityError, PeerFailedError, PeerGoneError, SampleOrigin, UserError
from lightning_dataflow.evaluation.acceptance import Decoding
from lightning_dataflow.evaluation.judges.sglang_server import SGLangDecoder, read_counts, sampling_params
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.services.sglang import LocalSGLang
from lightning_dataflow.sglang_plugin.settings import REST_S
from lightning_dataflow.sglang_plugin.wire import MAX_ANSWER_BYTES, CaptureRequest
from lightning_dataflow.stores import MemoryFeatureStore, MooncakeFeatureStore
from lightning_dataflow.strategies.common.head_check import check_served_head
from lightning_dataflow.targets import HFTargetEngine, SGLangServerTarget
from lightning_dataflow.targets.conformance import compare_engines, make_prompts, table
from lightning_dataflow.targets.logits import LogitsTransform
from lightning_dataflow.targets.sglang_http import CaptureServer
from tests.conftest import LAYER_IDS
from tests.decoding import greedy_decode
from tests.system.sglang.conftest import KEY

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(start):
    with start() as running:
        yield running


@pytest.fixture
def store(mooncake):
    store = MooncakeFeatureStore("test", master_address=mooncake.master_address, metrics_address=mooncake.metrics_address)
    yield store
    store.clear()
    store.close()


@pytest.fixture
def connect(target_path, store):
    def make(*servers: LocalSGLang, **options) -> SGLangServerTarget:
        urls = [server.url for server in servers]
        defaults = {"layer_ids": LAYER_IDS, "api_key": KEY, "absence_s": 1.0}
        return SGLangServerTarget(target_path, urls=urls, store_id="test", store=store, **{**defaults, **options})

    return make


def test_features_are_those_of_transformers(server, connect, target_path):
    engine = connect(server)
    assert engine.info.max_position_embeddings == 505  # SGLang keeps seven tokens of 512 for itself
    every = HFTargetEngine(target_path, layer_ids=range(8), dtype="float32", device="cpu")
    actual = compare_engines(every, engine, make_prompts(320, 505, lengths=(1, 2, 3, 5, 8, 13, 33, 100, 257, 400, 505)))
    assert [one.problems for one in actual if one.problems] == []
    assert max(error for one in actual for _, error in one.differences.values()) < 1e-5


def test_its_log_probabilities_are_those_of_the_head(server, connect):
    engine = connect(server, features=("aux_hidden_states",))
    assert engine.logprobs_of([0, 20, 40])[1] is not None
    check_served_head(engine)
    engine.info = replace(engine.info, logits=LogitsTransform(scale=0.8))
    with pytest.raises(UserError, match="its log-probabilities differ by up to"):
        check_served_head(engine)


def test_a_request_costs_the_same_bytes_whatever_its_length(server, connect, store, monkeypatch):
    engine = connect(server)
    exchange, sizes = engine.servers[0]._exchange, []

    def measured(*arguments):
        status, text = exchange(*arguments)
        sizes.append(len(text))
        return status, text

    monkeypatch.setattr(engine.servers[0], "_exchange", measured)
    for length in (2, 500):
        engine.capture([[7] * length])
    assert max(sizes) < MAX_ANSWER_BYTES and abs(sizes[0] - sizes[1]) < 100
    assert store.health()["num_bytes"] == 0, "captures that were read are freed"


def test_the_key_is_in_no_log_and_on_no_command_line(server):
    log = server.log_path.read_text()
    assert "api_key=***" in log.replace("'", "").replace('"', "").replace(": ", "=") and "the" + "'key" not in log
    assert server.log_path.stat().st_mode & 0o777 == 0o600
    shown = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert server.url.rpartition(":")[2] in shown and KEY not in shown
    with pytest.raises(UserError, match=r"refuses our key \(401\)"):
        CaptureServer(server.url).check("test", LAYER_IDS)


def test_other_requests_get_what_stock_sglang_answers(server):
    states = stock_answer(server, [5, 6, 7])
    assert (len(states), len(states[0])) == (3, 64 * len(LAYER_IDS))


def test_an_evaluation_tells_a_server_that_does_not_speculate(server, target):
    """A capture server names an algorithm for speculation, and has no draft."""
    decoder = SGLangDecoder(url=server.url, api_key=KEY)
    with pytest.raises(UserError, match="does not speculate: start it with --speculative-algorithm and a draft") as raised:
        decoder.evaluate([[5, 6, 7]], Decoding(max_new_tokens=4), stop_token_ids=[])
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"refuses our key \(401\)"):
        SGLangDecoder(url=server.url, api_key="wrong").evaluate([[5]], Decoding(max_new_tokens=4), stop_token_ids=[])
    # What it does as the server of the target alone.
    prompts = [[5, 6, 7], list(range(40, 60)), [9]]
    own = [greedy_decode(target, prompt, 12) for prompt in prompts]
    stop = own[1][5]
    answers, seconds = decoder.generate(prompts, sampling_params(12, 0.0, [stop]), batch_size=2)
    ends = {stop, *target.eos_token_ids}
    cut = [tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens)) + 1] for tokens in own]
    assert [answer["output_ids"] for answer in answers] == cut and seconds > 0
    with pytest.raises(UserError, match="generated without speculation, its answer has no spec_verify_ct"):
        read_counts(answers[0], 3, "the server")


def stock_answer(server: LocalSGLang, token_ids: list[int]) -> list[list[float]]:
    body = {"input_ids": token_ids, "return_hidden_states": True, "sampling_params": {"max_new_tokens": 1}}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{server.url}/generate", json.dumps(body).encode(), headers)
    (states,) = json.load(urllib.request.urlopen(request, timeout=60))["meta_info"]["hidden_states"]
    return states


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ({"api_key": "wrong"}, [1], r"refuses our key \(401\): set target.api_key_file"),
        ({"layer_ids": (1, 3, 5)}, [1], r"other layers.*\(1, 3, 4\).* than this run .*\(1, 3, 5\)"),
        ({}, [1] * 600, r"600 tokens\) is longer than the model's context"),
    ],
)
def test_bad_input_is_one_line(server, connect, options, prompt, message):
    with pytest.raises(UserError, match=message) as raised:
        connect(server, **options).capture([prompt])
    assert "\n" not in str(raised.value)


def test_another_target(server, store, tmp_path):
    from lightning_dataflow.targets.tiny import write_tiny_target

    other = write_tiny_target(tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace("1e-06", "1e-05"))
    options = {"urls": [server.url], "store": store, "store_id": "test", "layer_ids": LAYER_IDS, "api_key": KEY}
    with pytest.raises(UserError, match="has other weights"):
        SGLangServerTarget(other, **options)


def test_a_request_without_what_it_needs_is_refused_and_the_server_lives(server):
    http = CaptureServer(server.url, api_key=KEY)
    with pytest.raises(UserError, match="the loss mask of x has 2 entries, the server read 3 tokens"):
        http.capture([1, 2, 3], CaptureRequest(store_id="test", sample_id="x", loss_mask=(0, 1)))
    with pytest.raises(UserError, match="not a valid id"):
        http.capture([1, 2], CaptureRequest(store_id="../etc", sample_id="x", loss_mask=(0, 1)))
    ref = http.capture([1, 2], CaptureRequest(store_id="test", sample_id="x", loss_mask=(0, 1), dry_run=True))
    assert ref.origin.capture.layer_ids == LAYER_IDS


def test_a_server_that_was_started_otherwise(start, connect):
    with start("--chunked-prefill-size", "64", store={"address": "127.0.0.1:1"}) as wrong:
        with pytest.raises(
            UserError, match="runs without --chunked-prefill-size -1: start it with: LIGHTNING_DATAFLOW_SERVER"
        ):
            connect(wrong)
        request = CaptureRequest(store_id="test", sample_id="x", loss_mask=(0, 1))
        with pytest.raises(UserError, match="does not run with --chunked-prefill-size -1: start it with"):
            CaptureServer(wrong.url, api_key=KEY).capture([1, 2], request)


def test_a_store_that_comes_and_goes(start, target_path, tmp_path):
    mooncake = LocalMooncake(capacity_bytes=16 << 20, log_dir=tmp_path)
    mooncake.close()
    master = mooncake.master_address
    options = {"store_id": "test", "layer_ids": LAYER_IDS, "api_key": KEY, "absence_s": 4.0}
    with start(store={"address": master}) as server:
        with pytest.raises(UserError, match=f"no Mooncake master listens at {master}"):
            SGLangServerTarget(target_path, urls=[server.url], store=MemoryFeatureStore(), **options)
        with mooncake:
            for each in mooncake.servers:
                each.start()
            time.sleep(REST_S)
            store = MooncakeFeatureStore("test", master_address=master)
            engine = SGLangServerTarget(target_path, urls=[server.url], store=store, **options)
            assert len(engine.capture([[1, 2, 3]])[0]["last_hidden_state"]) == 3
            with pytest.raises(CapacityError, match="Mooncake found no room"):
                for index in range(1000):
                    engine.capture_ref([index % 300] * 500, [1] * 500, origin(engine, f"x{index}", 500))
            store.clear()
            assert len(engine.capture([[1, 2, 3]])[0]["last_hidden_state"]) == 3
        for kind in (PeerGoneError, PeerFailedError):
            with pytest.raises(kind, match="Mooncake master"):
                engine.capture_ref([1, 2], [1, 1], origin(engine, "y", 2))
        assert stock_answer(server, [5, 6, 7]), "other requests are served all the same"


def test_a_server_of_another_mooncake_is_refused(start, connect, tmp_path):
    """Its store has the same name there."""
    with (
        LocalMooncake(capacity_bytes=16 << 20, log_dir=tmp_path) as other,
        start(store={"address": other.master_address}) as server,
        pytest.raises(UserError, match="stores into another mooncake://test than this run reads"),
    ):
        connect(server)


def origin(engine: SGLangServerTarget, name: str, num_tokens: int) -> SampleOrigin:
    return SampleOrigin(
        sample_id=name,
        run_id="test",
        source_task_id=name,
        source_id=name,
        capture=engine.capture_spec,
        target_model_version=engine.info.model_version,
        tokenizer_version=engine.info.tokenizer_version,
        num_tokens=num_tokens,
    )


def test_two_servers_one_killed_half_way(server, start, connect, monkeypatch):
    prompts = [list(range(1, 20 + index % 30)) for index in range(200)]
    with start() as other:
        engine = connect(server, other)
        victim, captured = engine.servers[1], []
        capture = victim.capture
        monkeypatch.setattr(victim, "capture", lambda *arguments: captured.append(capture(*arguments)) or captured[-1])

        def kill() -> None:
            while len(captured) < 20:
                threading.Event().wait(0.01)
            other.close()

        threading.Thread(target=kill, daemon=True).start()
        actual = engine.capture(prompts)
    assert [len(one["last_hidden_state"]) for one in actual] == [len(prompt) for prompt in prompts]
    assert 20 <= len(captured) < 150
    torch.testing.assert_close(engine.capture(prompts[:1])[0], actual[0], atol=1e-4, rtol=1e-4)


def test_two_ranks_give_the_features_of_one_and_one_of_them_writes(start, connect, target_path, store, monkeypatch):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # the stand-ins are nothing to compile
    with start("--tp-size", "2") as server:
        engine = connect(server)
        every = HFTargetEngine(target_path, layer_ids=range(8), dtype="float32", device="cpu")
        actual = compare_engines(every, engine, make_prompts(320, 300))
        assert [one.problems for one in actual if one.problems] == []
        assert max(error for one in actual for _, error in one.differences.values()) < 1e-5
        engine.capture_ref([1, 2, 3], [0, 1, 1], origin(engine, "once", 3))
        assert store.health()["num_samples"] == 1


def test_bfloat16(start, connect, target_path):
    with start("--dtype", "bfloat16") as server:
        engine = connect(server)
        every = HFTargetEngine(target_path, layer_ids=range(8), dtype="float32", device="cpu")
        actual = compare_engines(every, engine, make_prompts(320, 300))
        assert {one.dtype for one in actual} == {engine.dtype} == {"bfloat16"}
        assert [one.problems for one in actual if one.problems] == [], table(actual)
        print(table(actual))
