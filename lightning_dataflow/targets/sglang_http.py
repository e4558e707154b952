"""One capture server over HTTP, with the standard library."""

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

from lightning_dataflow.contracts import PeerGoneError, SampleRef, UserError
from lightning_dataflow.sglang_plugin.wire import (
    CaptureRequest,
    ServerDescription,
    check_version,
    flag_problems,
    longest_prompt,
    start_advice,
)
from lightning_dataflow.targets.sglang_answer import (
    ServerRefusalError,
    generate_arguments,
    read_answer,
    read_description,
    read_ref,
)

CONNECT_TIMEOUT_S = 5.0


class CaptureServer:
    """Asks one server for features. Thread-safe: every thread has a connection of its own.

    No request is sent twice: whether a server that went away had stored something, nobody knows.

    Attributes:
        max_tokens: the longest prompt that it takes, once it was checked.
        num_bytes_sent, num_bytes_received: bodies of all requests for capture, and of their answers.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 300.0):
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise UserError(f"target.urls: {url!r} has no valid port ({error}), expected http://HOST:PORT") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"target.urls: {url!r} is no address of a server, expected http://HOST:PORT")
        self.url = url.rstrip("/")
        self.max_tokens = 0
        self.num_bytes_sent = self.num_bytes_received = self.num_captures = 0
        self._host, self._port, self._prefix = parts.hostname, port, parts.path.rstrip("/")
        self._connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        self._threads = threading.local()
        self._lock = threading.Lock()
        self._connections: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()  # threads end
        self._stopping = False

    def check(self, store_id: str, model_path: str, layer_ids: Sequence[int]) -> ServerDescription:
        """What the server captures, and that it can reach its store.

        Raises:
            PeerGoneError: nobody answers.
            UserError: it cannot capture; says what to change, with the whole command line.
        """
        args = self._object(self._ask("GET", "/server_info", None)[0])
        try:
            check_version(str(args.get("version")))
        except UserError as error:
            raise UserError(f"the server at {self.url}: {error}") from None
        problems = flag_problems(args)
        if problems:
            raise UserError(
                f"the server at {self.url} runs without {', '.join(problems)}: {start_advice(model_path, layer_ids)}"
            )
        self.max_tokens = longest_prompt(args, f"the server at {self.url}")
        return read_description(self._generate([0], CaptureRequest(store_id=store_id, sample_id="describe")))

    def capture(self, token_ids: Sequence[int], request: CaptureRequest) -> SampleRef:
        """Have the features of a prompt stored; returns the server's reference.

        Raises:
            PeerGoneError: it does not answer, and may have stored the features all the same: ask for the next attempt.
            CapacityError: the store is full.
            CaptureMismatchError: it read other tokens.
            CaptureFailedError: it failed with this prompt.
            UserError: it refuses.
        """
        return read_ref(self._generate(token_ids, request), token_ids, f"the server at {self.url}")

    def close(self) -> None:
        """Drop this thread's connection."""
        connection = self._threads.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def stop_waiting(self) -> None:
        """Calls, those that wait already among them, raise PeerGoneError at once."""
        with self._lock:
            self._stopping = True
            for connection in self._connections:
                if connection.sock is not None:
                    with suppress(OSError):
                        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def _generate(self, token_ids: Sequence[int], request: CaptureRequest) -> dict[str, Any]:
        text, sent = self._ask("POST", "/generate", generate_arguments(token_ids, request))
        with self._lock:
            self.num_captures += 1
            self.num_bytes_sent += sent
            self.num_bytes_received += len(text)
        return read_answer(self._object(text), f"the server at {self.url}")

    def _object(self, text: bytes) -> dict[str, Any]:
        with suppress(ValueError):
            data = json.loads(text)
            if isinstance(data, dict):
                return data
        raise ServerRefusalError(f"what answers at {self.url} is no SGLang server")

    def _ask(self, method: str, path: str, body: Any) -> tuple[bytes, int]:
        """The body of a good answer, and the bytes sent for it."""
        data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            connection = self._connection()
            connection.request(method, self._prefix + path, data or None, self._headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise PeerGoneError(
                f"the server at {self.url} does not answer ({str(error) or type(error).__name__})"
            ) from error
        if status == 200:
            return text, len(data)
        reason = _reason(text)
        if status in (401, 403):
            raise ServerRefusalError(f"the server at {self.url} refuses our key ({status}): set target.api_key_file")
        if status == 400:
            raise UserError(f"the server at {self.url} refuses the request: {reason}")
        raise PeerGoneError(f"the server at {self.url} answered {status}: {reason}")

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's, a new one where the server has closed it."""
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
    """Of a connection on which nothing is asked: the other side has closed it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _reason(text: bytes) -> str:
    try:
        data = json.loads(text)
        message = data["error"]["message"] if isinstance(data.get("error"), dict) else data.get("message", data)
    except (ValueError, KeyError, AttributeError):
        message = text.decode(errors="replace")
    return " ".join(str(message).split())[:300]
