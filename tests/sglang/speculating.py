"""A server that answers as SGLang 0.5.23 does while it speculates, recorded shapes and made-up numbers."""

import json
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

K = 3
INFO = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1, "speculative_num_draft_tokens": K + 1}
META = {"spec_verify_ct": 2, "spec_num_correct_drafts": 3, "spec_correct_drafts_histogram": [1, 0, 0, 1]}


class SpeculatingServer:
    """With `with`. `requests` are the bodies that /generate got.

    Args:
        info: of /server_info.
        meta: of `meta_info`, beside the number of tokens.
        answer: what else an answer has, or has in place of these.
        first_s: what the first request takes longer.
    """

    def __init__(
        self,
        *,
        info: dict[str, Any] = INFO,
        meta: dict[str, Any] = META,
        answer: Mapping[str, Any] = MappingProxyType({}),
        first_s: float = 0.0,
    ):
        requests: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(info)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not requests:
                    time.sleep(first_s)
                requests.append(body)
                tokens = list(range(5, 5 + body["sampling_params"]["max_new_tokens"]))
                one = {"output_ids": tokens, "meta_info": {"completion_tokens": len(tokens), **meta}} | answer
                self.answer([one] * len(body["input_ids"]))

            def answer(self, found: Any) -> None:
                data = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.requests = requests
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "SpeculatingServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
