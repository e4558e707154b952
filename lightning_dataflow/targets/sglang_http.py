"""One capture server over HTTP, with the standard library."""

import http.client
import json
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from lightning_dataflow.contracts import SampleRef, UserError
from lightning_dataflow.sglang_plugin.wire import (
    CaptureRequest,
    ServerDescription,
    check_version,
    flag_problems,
    start_advice,
)
from lightning_dataflow.targets.sglang_answer import (
    ServerGoneError,
    fresh_rid,
    generate_arguments,
    read_answer,
    read_description,
    read_ref,
)

CONNECT_TIMEOUT_S = 5.0


class CaptureServer:
    """Asks one server for features. Thread-safe: every thread has a connection of its own.

    Attributes:
        max_tokens: the longest prompt that it takes, once it was checked.
        num_bytes_sent, num_bytes_received: bodies of all requests for capture, and of their answers.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 300.0):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"target.urls: {url!r} is no address of a server, expected http://HOST:PORT")
        self.url = url.rstrip("/")
        self.max_tokens = 0
        self.num_bytes_sent = self.num_bytes_received = self.num_captures = 0
        self._host, self._port, self._prefix = parts.hostname, parts.port, parts.path.rstrip("/")
        self._connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        self._threads = threading.local()
        self._lock = threading.Lock()

    def check(self, store_id: str, model_path: str, layer_ids: Sequence[int]) -> ServerDescription:
        """What the server captures, and that it can reach its store.

        Raises:
            ServerGoneError: nobody answers.
            UserError: it cannot capture; says what to change, with the whole command line.
        """
        try:
            args = json.loads(self._ask("GET", "/server_info", None)[0])
        except json.JSONDecodeError as error:
            raise UserError(f"what answers at {self.url} is no SGLang server") from error
        try:
            check_version(str(args.get("version")))
        except UserError as error:
            raise UserError(f"the server at {self.url}: {error}") from None
        problems = flag_problems(args)
        if problems:
            raise UserError(
                f"the server at {self.url} runs without {', '.join(problems)}: {start_advice(model_path, layer_ids)}"
            )
        self.max_tokens = int(args["max_req_input_len"]) - 1  # SGLang takes less than this
        return read_description(self._generate([0], CaptureRequest(store_id=store_id, sample_id="describe")))

    def capture(self, token_ids: Sequence[int], request: CaptureRequest) -> SampleRef:
        """Have the features of a prompt stored; returns the server's reference.

        Raises:
            ServerGoneError: ask another server.
            CapacityError: the store is full.
            CaptureMismatchError: it read other tokens.
            UserError: it refuses.
        """
        return read_ref(self._generate(token_ids, request), token_ids, f"the server at {self.url}")

    def close(self) -> None:
        """Drop this thread's connection."""
        connection = self._threads.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def _generate(self, token_ids: Sequence[int], request: CaptureRequest) -> dict[str, Any]:
        text, sent = self._ask("POST", "/generate", generate_arguments(token_ids, request))
        with self._lock:
            self.num_captures += 1
            self.num_bytes_sent += sent
            self.num_bytes_received += len(text)
        try:
            output = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"what answers at {self.url} is no SGLang server") from error
        return read_answer(output, f"the server at {self.url}")

    def _ask(self, method: str, path: str, body: Any) -> tuple[bytes, int]:
        """The body of a good answer, and the bytes sent for it; one more try where a kept connection had gone stale."""
        data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        fresh = not hasattr(self._threads, "connection")
        try:
            status, text = self._exchange(method, path, data)
        except (http.client.BadStatusLine, BrokenPipeError, ConnectionResetError) as error:
            self.close()
            if fresh:
                raise self._gone(error) from error
            return self._ask(method, path, body if body is None else {**body, "rid": fresh_rid()})
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._gone(error) from error
        if status == 200:
            return text, len(data)
        reason = _reason(text)
        if status in (401, 403):
            raise UserError(f"the server at {self.url} refuses our key ({status}): set target.api_key_file")
        if status == 400:
            raise UserError(f"the server at {self.url} refuses the request: {reason}")
        raise ServerGoneError(f"the server at {self.url} answered {status}: {reason}")

    def _exchange(self, method: str, path: str, data: bytes) -> tuple[int, bytes]:
        if not hasattr(self._threads, "connection"):
            connection = self._connection_type(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
            connection.connect()
            assert connection.sock is not None, "connected"
            connection.sock.settimeout(self._timeout_s)
            self._threads.connection = connection
        connection = self._threads.connection
        connection.request(method, self._prefix + path, data or None, self._headers)
        response = connection.getresponse()
        return response.status, response.read()

    def _gone(self, error: Exception) -> ServerGoneError:
        return ServerGoneError(f"the server at {self.url} does not answer ({str(error) or type(error).__name__})")


def _reason(text: bytes) -> str:
    try:
        data = json.loads(text)
        message = data["error"]["message"] if isinstance(data.get("error"), dict) else data.get("message", data)
    except (ValueError, KeyError, AttributeError):
        message = text.decode(errors="replace")
    return " ".join(str(message).split())[:300]
