"""The client of capture servers, against servers that fail on demand; tests/system/test_sglang.py has the real one."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from lightning_dataflow.contracts import (
    CapacityError,
    CaptureMismatchError,
    PeerFailedError,
    SampleOrigin,
    UserError,
    ref_to_json,
)
from lightning_dataflow.sglang_plugin.wire import (
    PARAM,
    ServerDescription,
    description_to_json,
    request_from_text,
    token_digest,
)
from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.targets import SGLangServerTarget
from tests.conftest import LAYER_IDS
from tests.unit.sglang_plugin.test_wire import RIGHT

ONE_AT_A_TIME = threading.Lock()  # of both servers: they have one target
Alter = Callable[[dict[str, Any]], dict[str, Any]]


class Server(ThreadingHTTPServer):
    """Answers as a capture server does, with real features in `store`, but for the faults that a test plants.

    Attributes:
        alter: what becomes of an answer.
        info: of the server's flags.
        dead: it drops connections.
    """

    daemon_threads = True

    def __init__(self, target, store: MemoryFeatureStore):
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.store = target, store
        self.alter: Alter = dict
        self.info = {**RIGHT, "version": "0.5.23", "max_req_input_len": 501}
        self.dead, self.num_captures, self.rids = False, 0, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.rids.append(body["rid"])
        request = request_from_text(body["sampling_params"]["custom_params"][PARAM], len(body["input_ids"]))
        info, spec = self.target.info, self.target.capture_spec
        if request.loss_mask is None:
            versions = {"model_version": info.model_version, "tokenizer_version": info.tokenizer_version}
            server = ServerDescription(capture=spec, dtype="float32", uri=self.store.uri, sglang="0.5.23", **versions)
            return self.alter({"server": description_to_json(server)})
        self.num_captures += 1
        with ONE_AT_A_TIME:
            (features,) = self.target.capture([body["input_ids"]])
        tensors = {
            "input_ids": torch.tensor(body["input_ids"]),
            "loss_mask": torch.tensor(request.loss_mask, dtype=torch.uint8),
        }
        ref = self.store.put({**tensors, **features}, origin(self.target, body["input_ids"], request.sample_id))
        return self.alter({"ref": ref_to_json(ref), "tokens": token_digest(body["input_ids"])})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        self.reply(self.server.info)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.dead:
            self.close_connection = True
            self.connection.close()
            return
        self.reply({"text": "", "meta_info": {"hidden_states": [json.dumps(self.server.answer(body))]}})

    def reply(self, data: dict[str, Any]) -> None:
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        pass


def origin(target, token_ids, name="run:1") -> SampleOrigin:
    return SampleOrigin(
        sample_id=name,
        run_id="run",
        source_task_id="1",
        source_id="1",
        capture=target.capture_spec,
        target_model_version=target.info.model_version,
        tokenizer_version=target.info.tokenizer_version,
        num_tokens=len(token_ids),
    )


@pytest.fixture
def store() -> MemoryFeatureStore:
    return MemoryFeatureStore()


@pytest.fixture
def servers(target, store) -> Iterator[list[Server]]:
    running = [Server(target, store), Server(target, store)]
    yield running
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(servers, store, target_path):
    def make(**options: Any) -> SGLangServerTarget:
        defaults = {"urls": [server.url for server in servers], "store_id": "run", "layer_ids": LAYER_IDS}
        return SGLangServerTarget(
            target_path, **{**defaults, "store_uri": store.uri, "reader": store, "absence_s": 0.3, **options}
        )

    return make


PROMPTS = [list(range(1, length)) for length in range(5, 25)]


def test_features_come_by_way_of_the_store(connect, servers, target):
    engine = connect()
    assert (engine.dtype, engine.info.max_position_embeddings) == ("float32", 500)
    for found, want in zip(engine.capture(PROMPTS), target.capture(PROMPTS), strict=True):
        for name, tensor in want.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4)
    assert all(server.num_captures for server in servers)
    rids = [rid for server in servers for rid in server.rids]
    assert len(rids) == len(set(rids)) == len(PROMPTS) + 2


def test_a_dead_servers_prompts_go_to_another_and_it_is_taken_back(connect, servers, capsys):
    engine = connect()
    servers[0].dead = True
    assert len(engine.capture(PROMPTS)) == len(PROMPTS)
    assert (servers[0].num_captures, servers[1].num_captures) == (0, len(PROMPTS))
    assert capsys.readouterr().out.count("lost a capture server") == 1
    servers[0].dead, servers[1].dead = False, True
    assert len(connect(urls=[servers[0].url]).capture(PROMPTS[:2])) == 2


def test_a_server_that_comes_back_with_another_model(connect, servers):
    engine = connect(urls=[servers[0].url], absence_s=10.0)
    servers[0].dead = True
    threading.Timer(0.5, lambda: setattr(servers[0], "dead", False)).start()
    servers[0].alter = described(model_version="0" * 16)
    with pytest.raises(CaptureMismatchError, match="has other weights"):
        engine.capture(PROMPTS[:1])


def test_all_gone(connect, servers):
    engine = connect()
    for server in servers:
        server.dead = True
    with pytest.raises(PeerFailedError, match=r"no capture server is left: the server at http://.* does not answer.*; the"):
        engine.capture(PROMPTS[:1])


def ref_with(**changes: Any) -> Alter:
    return lambda answer: {**answer, "ref": {**answer["ref"], **changes}} if "ref" in answer else answer


def origin_with(**changes: Any) -> Alter:
    return lambda answer: ref_with(origin={**answer["ref"]["origin"], **changes})(answer) if "ref" in answer else answer


def answer_with(**changes: Any) -> Alter:
    return lambda answer: {**answer, **changes} if "ref" in answer else answer


CAPTURE = {"layer_ids": [1, 3, 5], "norm": "post", "hidden_size": 64}


@pytest.mark.parametrize(
    ("alter", "kind", "message"),
    [
        (answer_with(tokens="00"), CaptureMismatchError, "read other tokens"),
        (ref_with(uri="mooncake://other"), CaptureMismatchError, "captured other store"),
        (origin_with(capture=CAPTURE), CaptureMismatchError, "captured other layers, norm and width"),
        (
            origin_with(capture={**CAPTURE, "layer_ids": [1, 3, 4], "norm": "pre"}),
            CaptureMismatchError,
            "captured other layers",
        ),
        (origin_with(target_model_version="f" * 16), CaptureMismatchError, "captured other weights"),
        (origin_with(sample_id="run:9"), CaptureMismatchError, "captured other sample"),
        (ref_with(num_bytes=7), UserError, "says 7 bytes"),
        (answer_with(error="full", message="no room"), CapacityError, "no room"),
        (answer_with(error="refused", message="flags"), UserError, "flags"),
        (answer_with(error="store", message="gone"), PeerFailedError, "no capture server is left: .*gone"),
        (answer_with(error="incomplete", message="1 of 6"), PeerFailedError, "1 of 6"),
    ],
)
def test_an_answer_is_input_not_truth(connect, servers, alter, kind, message):
    engine = connect(urls=[servers[0].url])
    servers[0].alter = alter
    with pytest.raises(kind, match=message):
        engine.capture_ref([1, 2, 3], [0, 1, 1], origin(engine, [1, 2, 3]))


def test_features_of_another_shape(connect, servers, monkeypatch, target):
    engine = connect(urls=[servers[0].url])
    monkeypatch.setattr(servers[0], "target", _Short(target))
    with pytest.raises(UserError, match="its first size must be the 3 tokens"):
        engine.capture_ref([1, 2, 3], [0, 1, 1], origin(engine, [1, 2, 3]))


class _Short:
    """Drops the first token, as a prefix cache does."""

    def __init__(self, target):
        self.info, self.capture_spec, self._target = target.info, target.capture_spec, target

    def capture(self, batch):
        return [{name: one[1:] for name, one in found.items()} for found in self._target.capture(batch)]


def described(**changes: Any) -> Alter:
    return lambda answer: {"server": {**answer["server"], **changes}} if "server" in answer else answer


@pytest.mark.parametrize(
    ("alter", "info", "message"),
    [
        (described(model_version="0" * 16), {}, "has other weights .* start it with the same model"),
        (described(capture=CAPTURE), {}, r"captures layers \[1, 3, 5\] .* --return-aux-hidden-state-layer-ids 1 3 4"),
        (described(uri="mooncake://x"), {}, "stores into mooncake://x"),
        (lambda answer: {"error": "store", "message": "no Mooncake"}, {}, "no Mooncake"),
        (dict, {"version": "0.5.10"}, r"SGLang 0\.5\.10 is not supported"),
        (dict, {"disable_radix_cache": False}, "runs without --disable-radix-cache: start it with"),
    ],
)
def test_what_a_server_lacks_is_said_at_the_start(connect, servers, alter, info, message):
    servers[0].alter = alter
    servers[0].info |= info
    with pytest.raises(UserError, match=message) as raised:
        connect()
    assert "\n" not in str(raised.value)


def test_servers_that_compute_in_different_types(connect, servers):
    servers[1].alter = described(dtype="bfloat16")
    with pytest.raises(UserError, match="computes in bfloat16, another one in float32"):
        connect()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "needs target.urls"),
        ({"urls": ["localhost:30000"]}, "is no address of a server"),
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
    monkeypatch.setattr(Handler, "reply", lambda self, data, reply=Handler.reply: reply(self, _stock(data)))
    with pytest.raises(UserError, match="does not capture: run `pip install lightning-dataflow` in its environment"):
        connect()


def _stock(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "meta_info": {"hidden_states": [[0.5, 0.25]]}} if "meta_info" in data else data


def test_refs_carry_our_names(connect):
    engine = connect()
    mine = replace(origin(engine, [1, 2, 3]), source_id="prompt-7", metadata={"pass": 2})
    assert engine.capture_ref([1, 2, 3], [0, 1, 1], mine).origin == mine
