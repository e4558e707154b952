"""The HTTP client of one capture server; standard library only."""

import http.client
import json
import secrets
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from lightning_dataflow.contracts import (
    BrokenFeaturesError,
    CapacityError,
    CaptureMismatchError,
    PeerGoneError,
    SampleRef,
    UserError,
    ref_from_json,
)
from lightning_dataflow.contracts.foreign import parse_json, without_advice
from lightning_dataflow.sglang_plugin.wire import (
    PARAM,
    CaptureRequest,
    check_version,
    flag_problems,
    longest_prompt,
    request_to_text,
    start_advice,
    token_digest,
)

CONNECT_TIMEOUT_S = 5.0
MAX_PLACE = 100
"""Limit on a server's description of where features are broken, in characters."""
MAX_ANSWER_BYTES = 16 << 20
"""A longer answer is cut, and is then not valid JSON."""


class CaptureFailedError(RuntimeError):
    """The server could not capture this prompt, though it and its store work."""


class ServerRefusalError(UserError):
    """This server cannot capture any prompt as it is set up."""


ERRORS: dict[str, type[Exception]] = {
    "full": CapacityError,
    "refused": UserError,
    "store": PeerGoneError,
}


class CaptureServer:
    """Asks one server for features. Thread-safe: every request has a connection of its own, as a capture takes far longer
    than to connect.

    No request is sent twice, because a server that does not answer may have stored the features all the same.

    Attributes:
        max_tokens: the longest prompt that the server takes; known after `check`.
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
        self.max_tokens = 0
        self._name = f"the server at {self.url}"
        self._host, self._prefix = parts.hostname, parts.path.rstrip("/")
        self._connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connections: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()
        self._stopping = False

    def check(self, model_path: str, layer_ids: Sequence[int]) -> None:
        """Ask for the server's settings.

        Raises:
            PeerGoneError: the server does not answer.
            UserError: it cannot capture; the message says what to change, with the whole command line.
        """
        settings = self._request("GET", "/server_info")
        check_version(str(settings.get("version")), f"{self._name}: ")
        problems = flag_problems(settings)
        if problems:
            raise UserError(f"{self._name} runs without {', '.join(problems)}: {start_advice(model_path, layer_ids)}")
        self.max_tokens = longest_prompt(settings, self._name)

    def capture(self, token_ids: Sequence[int], request: CaptureRequest) -> SampleRef:
        """Have the features of a prompt stored; returns the server's reference.

        Raises:
            PeerGoneError: no answer, or the server lost its store. The features may be stored all the same: ask for the
                next attempt.
            BrokenFeaturesError: the features hold NaN or infinity.
            CapacityError: the store is full.
            CaptureMismatchError: the server read other tokens.
            CaptureFailedError: the server failed with this prompt.
            ServerRefusalError: the server does not have the plugin, or refuses our key.
            UserError: the server refuses the request.
        """
        answer = self._generate(token_ids, request)
        if answer.get("tokens") != token_digest(token_ids):
            raise CaptureMismatchError(f"{self._name} read other tokens than were sent")
        return ref_from_json(answer.get("ref"))

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float] | None:
        """The log-probability of each token after the first, by the server's own logits; None if it does not give them."""
        body = {
            "rid": f"ldf-{secrets.token_hex(16)}",
            "input_ids": list(token_ids),
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        }
        try:
            entries = self._request("POST", "/generate", body)["meta_info"]["input_token_logprobs"]
            logprobs = [float(entry[0]) for entry in entries[1:]]
        except (UserError, PeerGoneError, LookupError, TypeError, ValueError):
            return None
        return logprobs if len(logprobs) == len(token_ids) - 1 else None

    def stop_waiting(self) -> None:
        """Make all calls, running and later ones, raise PeerGoneError at once."""
        with self._lock:
            self._stopping = True
            for connection in self._connections:
                if (sock := connection.sock) is not None:  # read once: its own thread may close it meanwhile
                    with suppress(OSError):
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _generate(self, token_ids: Sequence[int], request: CaptureRequest) -> dict[str, Any]:
        """The plugin's answer to a request."""
        output = self._request("POST", "/generate", _generate_body(token_ids, request))
        try:
            finish = output["meta_info"].get("finish_reason") or {}
            if finish.get("type") == "abort":
                raise PeerGoneError(f"{self._name} aborted the request: {finish.get('message')}")
            (text,) = output["meta_info"]["hidden_states"]
            answer = dict(parse_json(text, "an answer"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerRefusalError(
                f"{self._name} does not capture: run `pip install lightning-dataflow` in its environment, and look for "
                "'lightning_dataflow' in its log"
            ) from error
        if answer.get("error") == "not_finite":
            raise BrokenFeaturesError(str(answer.get("message"))[:MAX_PLACE])
        if "error" in answer:
            raise ERRORS.get(str(answer["error"]), CaptureFailedError)(f"{self._name}: {answer.get('message')}")
        return answer

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers."""
        status, text = self._exchange(method, path, body)
        if status in (401, 403):
            raise ServerRefusalError(f"{self._name} refuses our key ({status}): set target.api_key_file")
        if status == 400:
            raise UserError(f"{self._name} refuses the request: {_reason(text)}")
        if status != 200:
            raise PeerGoneError(f"{self._name} answered {status}: {_reason(text)}")
        with suppress(ValueError):
            answer = parse_json(text, "an answer")
            if isinstance(answer, dict):
                return answer
        raise ServerRefusalError(f"what answers at {self.url} is no SGLang server")

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            with self._connected() as connection:
                connection.request(method, self._prefix + path, data, self._headers)
                response = connection.getresponse()
                return response.status, response.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise PeerGoneError(f"{self._name} does not answer ({str(error) or type(error).__name__})") from error

    @contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        """A connection that `stop_waiting` can break."""
        with closing(self._connection_type(self._host, self._port, timeout=CONNECT_TIMEOUT_S)) as connection:
            connection.connect()
            assert connection.sock is not None, "connected"
            connection.sock.settimeout(self._timeout_s)
            with self._lock:
                self._connections.add(connection)
                if self._stopping:
                    raise ConnectionAbortedError("this process is ending")
            yield connection


def _generate_body(token_ids: Sequence[int], request: CaptureRequest) -> dict[str, Any]:
    return {
        "rid": f"ldf-{secrets.token_hex(16)}",  # SGLang refuses a request id that it has seen
        "input_ids": list(token_ids),
        "return_hidden_states": True,
        "sampling_params": {
            "max_new_tokens": 1,
            "temperature": 0.0,
            "custom_params": {PARAM: request_to_text(request)},
        },
    }


def _reason(text: bytes) -> str:
    """The message of SGLang's error answer."""
    try:
        data = parse_json(text, "an answer")
        message = data["error"]["message"] if isinstance(data.get("error"), dict) else data.get("message", data)
    except (ValueError, KeyError, AttributeError):
        message = text.decode(errors="replace")
    return without_advice(str(message))
