"""Capture servers that fail on demand, and what tests ask of their client."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from lightning_dataflow.contracts import PeerGoneError, SampleOrigin, SampleRef, ref_to_json
from lightning_dataflow.sglang_plugin.wire import PARAM, request_from_text, token_digest
from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.stores.base import new_ref
from tests.unit.sglang_plugin.test_wire import RIGHT

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


PROMPTS = [list(range(1, length)) for length in range(5, 25)]


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


def in_dry_runs(alter: Alter) -> Alter:
    return lambda answer: alter({**answer, "dry_run": False}) if answer["dry_run"] else answer


def stock(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "meta_info": {"hidden_states": [[0.5, 0.25]]}} if "meta_info" in data else data
