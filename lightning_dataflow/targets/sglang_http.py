"""One capture server over HTTP, with the standard library."""

import http.client
import json
import secrets
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from lightning_dataflow.contracts import CapacityError, CaptureMismatchError, SampleRef, UserError, ref_from_json
from lightning_dataflow.sglang_plugin.wire import (
    PARAM,
    CaptureRequest,
    ServerDescription,
    check_version,
    description_from_json,
    flag_problems,
    request_to_text,
    start_advice,
    token_digest,
)

CONNECT_TIMEOUT_S = 5.0


class ServerGoneError(ConnectionError):
    """A server does not answer, or not for now; another one may. The message names it."""


class CaptureServer:
    """Asks one server for features. Thread-safe: every thread has a connection of its own.

    Attributes:
        num_bytes_sent, num_bytes_received: bodies of all requests for capture, and of their answers.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 300.0):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"target.urls: {url!r} is no address of a server, expected http://HOST:PORT")
        self.url = url.rstrip("/")
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
        args = json.loads(self._ask("GET", "/server_info", None)[0])
        try:
            check_version(str(args.get("version")))
        except UserError as error:
            raise UserError(f"the server at {self.url}: {error}") from None
        problems = flag_problems(args)
        if problems:
            raise UserError(
                f"the server at {self.url} runs without {', '.join(problems)}: {start_advice(model_path, layer_ids)}"
            )
        answer = self._generate([0], CaptureRequest(store_id=store_id, sample_id="describe"))
        return description_from_json(answer.get("server"))

    def capture(self, token_ids: Sequence[int], request: CaptureRequest) -> SampleRef:
        """Have the features of a prompt stored; returns the server's reference.

        Raises:
            ServerGoneError: ask another server.
            CapacityError: the store is full.
            CaptureMismatchError: it read other tokens.
            UserError: it refuses.
        """
        answer = self._generate(token_ids, request)
        if answer.get("tokens") != token_digest(token_ids):
            raise CaptureMismatchError(f"the server at {self.url} read other tokens of {request.sample_id} than were sent")
        return ref_from_json(answer.get("ref"))

    def close(self) -> None:
        """Drop this thread's connection."""
        connection = self._threads.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def _generate(self, token_ids: Sequence[int], request: CaptureRequest) -> dict[str, Any]:
        body = {
            "rid": f"ldf-{secrets.token_hex(16)}",  # a server refuses a name that it has seen
            "input_ids": list(token_ids),
            "return_hidden_states": True,
            "sampling_params": {
                "max_new_tokens": 1,
                "temperature": 0.0,
                "custom_params": {PARAM: request_to_text(request)},
            },
        }
        text, sent = self._ask("POST", "/generate", body)
        with self._lock:
            self.num_captures += 1
            self.num_bytes_sent += sent
            self.num_bytes_received += len(text)
        return self._read_answer(text)

    def _read_answer(self, text: bytes) -> dict[str, Any]:
        try:
            (answer,) = json.loads(text)["meta_info"]["hidden_states"]
            found = json.loads(answer)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the server at {self.url} does not capture: run `pip install lightning-dataflow` in its environment, and "
                "look for 'lightning_dataflow' in its log"
            ) from error
        if "error" not in found:
            return found
        message = f"{self.url}: {found.get('message')}"
        kind = found["error"]
        if kind == "full":
            raise CapacityError(message)
        if kind == "mismatch":
            raise CaptureMismatchError(message)
        if kind == "refused":
            raise UserError(message)
        raise ServerGoneError(message)

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
            return self._ask(method, path, body if body is None else {**body, "rid": f"ldf-{secrets.token_hex(16)}"})
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
