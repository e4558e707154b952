"""What the client of capture servers refuses at the start of a run: wrong flags, stores, keys and addresses."""

import json

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.stores import MemoryFeatureStore
from tests.unit.targets.capture_servers import (
    OTHER_LAYERS,
    Handler,
    answer_with,
    ask,
    in_dry_runs,
    lose,
    origin_with,
    ref_with,
    stock,
)

pytestmark = pytest.mark.integration  # servers that come, go and hang


@pytest.mark.parametrize(
    ("alter", "info", "message"),
    [
        (in_dry_runs(origin_with(target_model_version="0" * 16)), {}, "has other weights .* start it with the same model"),
        (
            in_dry_runs(origin_with(capture=OTHER_LAYERS)),
            {},
            r"layers.*\(1, 3, 5\).* --return-aux-hidden-state-layer-ids 1 3 4",
        ),
        (in_dry_runs(ref_with(uri="mooncake://x")), {}, "has another store .mooncake://x. .*: correct the server's file"),
        (lambda answer: {"error": "store", "message": "no Mooncake"}, {}, "no Mooncake"),
        (dict, {"version": "0.5.10"}, r"SGLang 0\.5\.10 is not supported"),
        (dict, {"disable_radix_cache": False}, "runs without --disable-radix-cache: start it with"),
        (dict, {"cuda_graph_config": {"prefill": {"backend": "breakable"}}}, "runs without --disable-prefill-cuda-graph"),
        (dict, {"max_req_input_len": None}, "does not say what it takes"),
        (answer_with(error="store", message="no room to breathe"), {}, "no room to breathe: correct the server's file"),
        (answer_with(error="failed", message="CUDA"), {}, "CUDA: correct the server's file"),
    ],
)
def test_what_a_server_lacks_is_said_at_the_start(connect, servers, alter, info, message):
    servers[0].alter = alter
    servers[0].info |= info
    with pytest.raises(UserError, match=message) as raised:
        connect()
    assert "\n" not in str(raised.value)


def test_servers_that_compute_in_different_types(connect, servers):
    servers[1].alter = lambda answer: json.loads(json.dumps(answer).replace("float32", "int32"))
    with pytest.raises(UserError, match=r"has another dtype .*int32.* than this run .*float32.*: give all servers the"):
        connect()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "needs target.urls"),
        ({"urls": ["localhost:30000"]}, "is no address of a server"),
        ({"urls": ["http://h:abc"]}, "has no valid port"),
        ({"urls": ["http://127.0.0.1:1"]}, "does not answer .*: start it with"),
        ({"layer_ids": (1, 7)}, "SGLang does not capture the last layer"),
    ],
)
def test_bad_input(connect, options, message):
    with pytest.raises(UserError, match=message):
        connect(**options)


def test_something_else_that_answers(connect, monkeypatch):
    def reply(self, data):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    monkeypatch.setattr(Handler, "reply", reply)
    with pytest.raises(UserError, match="is no SGLang server"):
        connect()


def test_a_server_that_wants_another_key(connect, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(401))
    with pytest.raises(UserError, match=r"refuses our key \(401\): set target.api_key_file"):
        connect()


def test_a_server_without_the_plugin(connect, servers, monkeypatch):
    monkeypatch.setattr(Handler, "reply", lambda self, data, reply=Handler.reply: reply(self, stock(data)))
    with pytest.raises(UserError, match="does not capture: run `pip install lightning-dataflow` in its environment"):
        connect()


def test_a_server_whose_store_is_another_of_the_same_name(connect, servers, store):
    elsewhere = MemoryFeatureStore()
    elsewhere.uri, servers[1].store = store.uri, elsewhere
    with pytest.raises(UserError, match=f"{servers[1].url} stores into another {store.uri} than this run reads"):
        connect()
    servers[1].store = store
    engine = connect()
    lose(engine, servers[0])
    lose(engine, servers[1])
    servers[1].store = elsewhere
    assert {ask(engine, f"run:{index}").uri for index in range(9)} == {store.uri}
    assert store.health()["num_samples"] == 9, "in the store of the first alone"


def test_a_full_store_keeps_no_server_away(connect, servers, store):
    servers[0].alter = answer_with(error="full", message="no room")
    engine = connect(urls=[servers[0].url])
    servers[0].alter = dict
    assert ask(engine).uri == store.uri
