"""The client of capture servers, against servers that fail on demand; tests/system/test_sglang.py has the real one."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from lightning_dataflow.contracts import (
    CapacityError,
    CaptureMismatchError,
    PeerFailedError,
    PeerGoneError,
    SampleOrigin,
    SampleRef,
    UserError,
    ref_to_json,
)
from lightning_dataflow.sglang_plugin.wire import (
    PARAM,
    request_from_text,
    token_digest,
)
from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.stores.base import new_ref
from lightning_dataflow.targets import SGLangServerTarget, sglang_pool, sglang_server
from lightning_dataflow.targets.sglang_http import CaptureFailedError, CaptureServer, ServerRefusalError
from tests.conftest import LAYER_IDS
from tests.unit.sglang_plugin.test_wire import RIGHT

pytestmark = pytest.mark.integration  # servers that come, go and hang
ONE_AT_A_TIME = threading.Lock()  # of both servers: they have one target
Alter = Callable[[dict[str, Any]], dict[str, Any]]


class Server(ThreadingHTTPServer):
    """Answers as a capture server does, with real features in `store`, but for the faults that a test plants.

    Attributes:
        alter: what becomes of an answer.
        info: of the server's flags.
        dead: it drops connections, once it has read a request.
        hung: it does not answer while this is set.
        requests: for capture, in the order of their arrival.
        logprobs: what it answers who asks for log-probabilities.
        looks: at once at this server, and the most there were.
    """

    daemon_threads = True

    def __init__(self, target, store: MemoryFeatureStore):
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.store = target, store
        self.alter: Alter = dict
        self.info = {**RIGHT, "version": "0.5.23", "max_req_input_len": 501}
        self.closed = False
        self.dead, self.num_captures, self.rids, self.requests = False, 0, [], []
        self.num_looks = self.most_looks = 0
        self.logprobs: dict[str, Any] = {}
        self.hung = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what a test wants."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.rids.append(body["rid"])
        request = request_from_text(body["sampling_params"]["custom_params"][PARAM], len(body["input_ids"]))
        if not request.dry_run:
            self.num_captures += 1
            self.requests.append(request)
        with ONE_AT_A_TIME:
            if self.closed:
                raise ConnectionAbortedError
            (features,) = self.target.capture([body["input_ids"]])
        tensors = {
            "input_ids": torch.tensor(body["input_ids"]),
            "loss_mask": torch.tensor(request.loss_mask, dtype=torch.uint8),
        }
        mine = replace(origin(self.target, body["input_ids"], request.sample_id), attempt=request.attempt)
        tensors |= {name: features[name] for name in request.features}
        ref = new_ref(tensors, mine, self.store.uri) if request.dry_run else self.store.put(tensors, mine)
        digest = token_digest(body["input_ids"])
        return self.alter({"ref": ref_to_json(ref), "tokens": digest, "dry_run": request.dry_run})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        self.server.num_looks += 1
        self.server.most_looks = max(self.server.most_looks, self.server.num_looks)
        try:
            if self.may_answer():
                self.reply(self.server.info)
        finally:
            self.server.num_looks -= 1

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("return_logprob"):
            self.reply({"meta_info": self.server.logprobs})
        elif self.may_answer():
            self.reply({"text": "", "meta_info": {"hidden_states": [json.dumps(self.server.answer(body))]}})

    def may_answer(self) -> bool:
        while self.server.hung.is_set():
            time.sleep(0.01)
        if self.server.dead:
            self.close_connection = True
            self.connection.close()
        return not self.server.dead

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
        server.closed = True
    with ONE_AT_A_TIME:
        pass  # a thread that is inside of torch when the interpreter ends takes the process down
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(servers, store, target_path, monkeypatch):
    monkeypatch.setattr(sglang_pool, "PROBE_PAUSE_S", 0.1)
    monkeypatch.setattr(sglang_server, "PROBE_TIMEOUT_S", 1.0)

    def make(**options: Any) -> SGLangServerTarget:
        defaults = {"urls": [server.url for server in servers], "store_id": "run", "layer_ids": LAYER_IDS}
        return SGLangServerTarget(target_path, **{**defaults, "store": store, "absence_s": 0.3, **options})

    return make


PROMPTS = [list(range(1, length)) for length in range(5, 25)]


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


def test_a_dead_servers_prompts_go_to_another_and_it_is_taken_back(connect, servers, caplog):
    engine = connect()
    servers[0].dead = True
    assert len(engine.capture(PROMPTS)) == len(PROMPTS)
    assert (servers[0].num_captures, servers[1].num_captures) == (1, 1 + len(PROMPTS))
    assert caplog.text.count("lost a capture server") == 1
    servers[0].dead, servers[1].dead = False, True
    assert len(connect(urls=[servers[0].url]).capture(PROMPTS[:2])) == 2


def test_a_server_that_comes_back_with_another_model(connect, servers):
    """It counts against no prompt, and ends the run where it was the only one."""
    engine = connect(urls=[servers[0].url])
    lose(engine, servers[0])
    servers[0].alter = in_dry_runs(origin_with(target_model_version="0" * 16))
    with pytest.raises(PeerFailedError, match=r"no capture server has answered for \d+ s: .* has other weights"):
        ask(engine)


def test_all_gone(connect, servers):
    engine = connect()
    for server in servers:
        server.dead = True
    with pytest.raises(
        PeerFailedError, match=r"no capture server has answered for \d+ s: the server at http://.* does not answer.*; the"
    ):
        engine.capture(PROMPTS[:1])


def ask(engine, name: str = "run:1") -> SampleRef:
    return engine.capture_ref([1, 2, 3], [0, 1, 1], origin(engine, [1, 2, 3], name))


def lose(engine, server: Server) -> None:
    server.dead = True
    with pytest.raises(PeerGoneError):
        ask(engine)
    server.dead = False


def ref_with(**changes: Any) -> Alter:
    return lambda answer: answer if answer["dry_run"] else {**answer, "ref": {**answer["ref"], **changes}}


def origin_with(**changes: Any) -> Alter:
    return lambda answer: ref_with(origin={**answer["ref"]["origin"], **changes})(answer)


def answer_with(**changes: Any) -> Alter:
    return lambda answer: answer if answer["dry_run"] else {**answer, **changes}


OTHER_LAYERS = {"layer_ids": [1, 3, 5], "norm": "post", "hidden_size": 64}


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


def in_dry_runs(alter: Alter) -> Alter:
    return lambda answer: alter({**answer, "dry_run": False}) if answer["dry_run"] else answer


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
    monkeypatch.setattr(Handler, "reply", lambda self, data, reply=Handler.reply: reply(self, _stock(data)))
    with pytest.raises(UserError, match="does not capture: run `pip install lightning-dataflow` in its environment"):
        connect()


def _stock(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "meta_info": {"hidden_states": [[0.5, 0.25]]}} if "meta_info" in data else data


def test_refs_carry_our_names(connect):
    engine = connect()
    mine = replace(origin(engine, [1, 2, 3]), source_id="prompt-7", metadata={"pass": 2})
    assert engine.capture_ref([1, 2, 3], [0, 1, 1], mine).origin == mine


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


def test_what_may_have_been_stored_is_not_asked_of_another(connect, servers):
    """The server may have died after it stored the features."""
    engine = connect()
    for server in servers:
        server.rids.clear()
        server.dead = True
    for _ in servers:
        before = [server.num_captures for server in servers]
        with pytest.raises(PeerGoneError, match="does not answer"):
            ask(engine)
        assert [server.num_captures for server in servers] == before
    with pytest.raises(PeerFailedError, match="no capture server has answered for"):
        ask(engine)


def test_a_request_that_the_server_aborts(connect, servers, monkeypatch):
    def abort(self, data, reply=Handler.reply):
        if "meta_info" in data:
            data = {"meta_info": {"finish_reason": {"type": "abort", "message": "weights are updated"}}}
        reply(self, data)

    engine = connect()
    monkeypatch.setattr(Handler, "reply", abort)
    with pytest.raises(PeerGoneError, match="aborted the request: weights are updated"):
        ask(engine)


@pytest.mark.parametrize(
    ("info", "alter", "reason"),
    [
        ({"disable_radix_cache": False}, dict, "runs without --disable-radix-cache"),
        ({"max_req_input_len": 200}, dict, "came back and takes 199 tokens, this run may send 500"),
        ({}, lambda answer: {"error": "store", "message": "no Mooncake"}, "no Mooncake"),
        ({}, answer_with(error="store", message="broken"), "broken"),
    ],
)
def test_a_server_that_comes_back_worse_stays_out_and_the_others_go_on(connect, servers, caplog, info, alter, reason):
    engine = connect(absence_s=0.5)
    lose(engine, servers[0])
    servers[0].info |= info
    servers[0].alter = alter
    time.sleep(0.1)
    before = servers[1].num_captures
    assert len(engine.capture(PROMPTS)) == len(PROMPTS)
    assert "is back" not in caplog.text
    assert servers[1].num_captures - before == len(PROMPTS)
    servers[1].dead = True
    with pytest.raises((PeerGoneError, PeerFailedError)):
        ask(engine)
    with pytest.raises(PeerFailedError, match=f"no capture server has answered for .*{reason}"):
        ask(engine)


def test_a_server_that_lost_its_plugin_is_no_fault_of_the_prompt(connect, servers, monkeypatch):
    engine = connect()
    monkeypatch.setattr(Handler, "reply", lambda self, data, reply=Handler.reply: reply(self, _stock(data)))
    with pytest.raises(PeerGoneError, match="does not capture") as raised:
        ask(engine)
    assert isinstance(raised.value.__cause__, ServerRefusalError)


def test_a_server_that_hangs_keeps_one_worker_at_most(connect, servers):
    engine = connect(in_flight=2)
    lose(engine, servers[0])
    servers[0].hung.set()
    try:
        time.sleep(0.1)
        servers[0].most_looks = 0
        assert len(engine.capture(PROMPTS)) == len(PROMPTS)
        assert servers[0].most_looks <= 1
    finally:
        servers[0].hung.clear()


def test_a_prompt_that_loses_every_server_is_at_fault_in_the_end(connect, servers):
    engine = connect()
    servers[0].alter = servers[1].alter = answer_with(error="store", message="codes [-600]")
    late = replace(origin(engine, [1, 2, 3]), attempt=10)
    with pytest.raises(CaptureFailedError, match=r"run:1 lost 10 servers in a row: .*codes \[-600\]"):
        engine.capture_ref([1, 2, 3], [0, 1, 1], late)


def test_servers_that_come_back_and_lose_everything_end_the_run(connect, servers):
    engine = connect(absence_s=0.7)
    for server in servers:
        server.alter = lambda answer: (
            {"error": "store", "message": "it flaps"}
            if answer.get("ref", {}).get("origin", {}).get("sample_id") == "run:1"
            else answer
        )
    with pytest.raises(PeerFailedError, match=r"no capture server has answered for \d+ s: .*it flaps"):
        for _ in range(20):
            with suppress(PeerGoneError):
                ask(engine)


def test_a_connection_that_is_closed_while_the_run_ends(servers):
    """By its own thread, at any moment."""

    class Closing:
        socks = iter([socket.socket(), None])
        sock = property(lambda self: next(self.socks))

    server = CaptureServer(servers[0].url)
    server._connections.add(closing := Closing())
    server.stop_waiting()
    assert closing.sock is None, "read once"


def test_who_waits_for_an_answer_is_freed_when_the_run_ends(connect, servers, caplog):
    engine = connect(urls=[servers[0].url], in_flight=1)
    servers[0].hung.set()
    try:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, engine, f"run:{index}") for index in range(2)]
            time.sleep(0.3)
            began = time.monotonic()
            engine.stop_waiting()
            for one in waiting:
                with pytest.raises(PeerGoneError):
                    one.result()
            assert time.monotonic() - began < 1.0
    finally:
        servers[0].hung.clear()
    assert "lost" not in caplog.text
