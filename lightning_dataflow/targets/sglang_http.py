"""The HTTP client of one capture server; standard library only."""

import http.client
import json
import select
import socket
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from lightning_dataflow.contracts import CaptureMismatchError, PeerGoneError, SampleRef, UserError, ref_from_json
from lightning_dataflow.sglang_plugin.wire import (
    CaptureRequest,
    ServerDescription,
    check_version,
    description_from_json,
    flag_problems,
    longest_prompt,
    start_advice,
    token_digest,
)
from lightning_dataflow.targets.sglang_answer import ServerRefusalError, generate_body, read_answer

CONNECT_TIMEOUT_S = 5.0


class CaptureServer:
    """Asks one server for features. Thread-safe: every thread has a connection of its own.

    No request is sent twice, because a server that does not answer may have stored the features all the same.

    Attributes:
        max_tokens: the longest prompt that the server takes; known after `check`.
        num_captures, num_bytes_received: answers to capture requests, and the size of their bodies.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 300.0):
        parts = urlsplit(url)
        try:
            self._port = parts.port
        except ValueError as error:
            raise UserError(f"target.urls: {url!r} has no valid port ({error}), expected http://HOST:PORT") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"target.urls: {url!r} is no address of a server, expected http://HOST:PORT")
        self.url = url.rstrip("/")
        self.max_tokens = self.num_captures = self.num_bytes_received = 0
        self._name = f"the server at {self.url}"
        self._host, self._prefix = parts.hostname, parts.path.rstrip("/")
        self._connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._timeout_s = timeout_s
        self._threads = threading.local()
        self._lock = threading.Lock()
        self._connections: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()  # threads end
        self._stopping = False

    def check(self, store_id: str, model_path: str, layer_ids: Sequence[int]) -> ServerDescription:
        """Ask what the server captures, and whether it reaches its store.

        Raises:
            PeerGoneError: the server does not answer.
            UserError: it cannot capture; the message says what to change, with the whole command line.
        """
        settings = self._request("GET", "/server_info")
        try:
            check_version(str(settings.get("version")))
        except UserError as error:
            raise UserError(f"{self._name}: {error}") from None
        problems = flag_problems(settings)
        if problems:
            raise UserError(f"{self._name} runs without {', '.join(problems)}: {start_advice(model_path, layer_ids)}")
        self.max_tokens = longest_prompt(settings, self._name)
        answer = self._generate([0], CaptureRequest(store_id=store_id, sample_id="describe"))
        return description_from_json(answer.get("server"))

    def capture(self, token_ids: Sequence[int], request: CaptureRequest) -> SampleRef:
        """Have the features of a prompt stored; returns the server's reference.

        Raises:
            PeerGoneError: no answer. The features may be stored all the same: ask for the next attempt.
            CapacityError: the store is full.
            CaptureMismatchError: the server read other tokens.
            CaptureFailedError: the server failed with this prompt.
            UserError: the server refuses the request.
        """
        answer = self._generate(token_ids, request)
        if answer.get("tokens") != token_digest(token_ids):
            raise CaptureMismatchError(f"{self._name} read other tokens than were sent")
        return ref_from_json(answer.get("ref"))

    def close(self) -> None:
        """Drop this thread's connection."""
        connection = self._threads.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def stop_waiting(self) -> None:
        """Make all calls, running and later ones, raise PeerGoneError at once."""
        with self._lock:
            self._stopping = True
            for connection in self._connections:
                if connection.sock is not None:
                    with suppress(OSError):
                        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def _generate(self, token_ids: Sequence[int], request: CaptureRequest) -> dict[str, Any]:
        return read_answer(self._request("POST", "/generate", generate_body(token_ids, request)), self._name)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers."""
        status, text = self._exchange(method, path, body)
        if status in (401, 403):
            raise ServerRefusalError(f"{self._name} refuses our key ({status}): set target.api_key_file")
        if status == 400:
            raise UserError(f"{self._name} refuses the request: {_reason(text)}")
        if status != 200:
            raise PeerGoneError(f"{self._name} answered {status}: {_reason(text)}")
        if body is not None:
            with self._lock:
                self.num_captures += 1
                self.num_bytes_received += len(text)
        with suppress(ValueError):
            answer = json.loads(text)
            if isinstance(answer, dict):
                return answer
        raise ServerRefusalError(f"what answers at {self.url} is no SGLang server")

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            connection = self._connection()
            connection.request(method, self._prefix + path, data, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise PeerGoneError(f"{self._name} does not answer ({str(error) or type(error).__name__})") from error

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection; a new one where the server has closed it."""
        connection = getattr(self._threads, "connection", None)
        if connection is not None and connection.sock is not None and not _is_readable(connection.sock):
            return connection
        self.close()
        connection = self._connection_type(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        connection.connect()
        assert connection.sock is not None, "connected"
        connection.sock.settimeout(self._timeout_s)
        self._threads.connection = connection
        with self._lock:
            self._connections.add(connection)
            if self._stopping:
                raise ConnectionAbortedError("this process is ending")
        return connection


def _is_readable(sock: socket.socket) -> bool:
    """While no request is under way, this means that the other side has closed the connection."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _reason(text: bytes) -> str:
    """The message of SGLang's error answer."""
    try:
        data = json.loads(text)
        message = data["error"]["message"] if isinstance(data.get("error"), dict) else data.get("message", data)
    except (ValueError, KeyError, AttributeError):
        message = text.decode(errors="replace")
    return " ".join(str(message).split())[:300]
