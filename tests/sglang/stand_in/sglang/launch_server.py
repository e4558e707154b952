"""Stands for `sglang.launch_server`: a server that captures with transformers, one prompt at a time.

It understands the flags, requests and answers that the client and the local server use, and stores features through the
plugin's own settings. What only SGLang can show is in tests/system/sglang.
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from lightning_dataflow.contracts import BrokenFeaturesError, SampleOrigin, ref_to_json
from lightning_dataflow.sglang_plugin.settings import read_settings
from lightning_dataflow.sglang_plugin.wire import (
    PARAM,
    request_from_text,
    token_digest,
)
from lightning_dataflow.stores.base import new_ref
from lightning_dataflow.stores.finite import check_features
from lightning_dataflow.targets import HFTargetEngine

LOCK = threading.Lock()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    parser.add_argument("--return-aux-hidden-state-layer-ids", nargs="+", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options, _ = parser.parse_known_args()
    Handler.key = options.api_key
    Handler.target = HFTargetEngine(
        options.model_path, layer_ids=options.return_aux_hidden_state_layer_ids, dtype="float32", device="cpu"
    )
    Handler.stores = read_settings()
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    key: str
    target: HFTargetEngine
    stores: Any

    def do_GET(self) -> None:
        self.reply({} if self.path == "/health" else self.server_info())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == f"Bearer {self.key}"
        if body.get("return_logprob"):
            return self.reply({"meta_info": {"input_token_logprobs": self.logprobs(body["input_ids"])}})
        request = request_from_text(body["sampling_params"]["custom_params"][PARAM], len(body["input_ids"]))
        with LOCK, self.stores.use(request.store_id) as store:
            answer = self.capture(body["input_ids"], request, store)
        self.reply({"meta_info": {"hidden_states": [json.dumps(answer)]}})

    def server_info(self) -> dict[str, Any]:
        return {
            "version": "0.5.23",
            "max_req_input_len": 1025,
            "enable_return_aux_hidden_states": True,
            "aux_hidden_state_capture": "dflash",
            "return_aux_hidden_state_layer_ids": self.target.layer_ids,
            "disable_radix_cache": True,
            "cuda_graph_config": {"prefill": {"backend": "disabled"}},
        }

    def logprobs(self, token_ids: list[int]) -> list[list[Any]]:
        with LOCK:
            logprobs = self.target.logits_of(token_ids)[1].log_softmax(-1)
        after_first = zip(token_ids[1:], logprobs, strict=False)
        return [[None, token_ids[0], None], *([float(row[token]), token, None] for token, row in after_first)]

    def capture(self, token_ids: list[int], request: Any, store: Any) -> dict[str, Any]:
        info, spec = self.target.info, self.target.capture_spec
        tensors = {
            "input_ids": torch.tensor(token_ids),
            "loss_mask": torch.tensor(request.loss_mask, dtype=torch.uint8),
            **{name: one for name, one in self.target.capture([token_ids])[0].items() if name in request.features},
        }
        origin = SampleOrigin(
            sample_id=request.sample_id,
            run_id=request.store_id,
            source_task_id=request.sample_id,
            source_id=request.sample_id,
            capture=spec,
            target_model_version=info.model_version,
            tokenizer_version=info.tokenizer_version,
            num_tokens=len(token_ids),
            attempt=request.attempt,
        )
        if not request.keeps_broken:
            try:
                check_features(tensors, spec.layer_ids)
            except BrokenFeaturesError as error:
                return {"error": "not_finite", "message": str(error)}
        ref = new_ref(tensors, origin, store.uri) if request.dry_run else store.put(tensors, origin)
        return {"ref": ref_to_json(ref), "tokens": token_digest(token_ids)}

    def reply(self, data: dict[str, Any]) -> None:
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        pass


if __name__ == "__main__":
    main()
