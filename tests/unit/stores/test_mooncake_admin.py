"""What answers at the metrics port of a Mooncake master, and is none or a damaged one."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.stores import StoreUnavailableError
from lightning_dataflow.stores.mooncake import admin
from lightning_dataflow.stores.mooncake.admin import MooncakeAdmin


class Handler(BaseHTTPRequestHandler):
    """Answers every request with the server's `answer`."""

    def do_GET(self) -> None:
        self.wfile.write(self.server.answer)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def answering() -> Iterator:
    """answering(body, head) → a client of a server that answers so."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def answer(body: bytes, head: bytes = b"HTTP/1.0 200 OK\r\n\r\n") -> MooncakeAdmin:
        server.answer = head + body
        return MooncakeAdmin(f"127.0.0.1:{server.server_port}")

    yield answer
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_metric(answering):
    assert answering(b"# HELP a b\n\nother 3\nsize 1.5e3\n").gauge("size") == 1500


@pytest.mark.parametrize("text", [b"", b"other 3", b"size", b"size x", b"size inf"])
def test_a_metric_that_is_missing_or_no_number(answering, text):
    with pytest.raises(StoreUnavailableError, match=r"at 127.0.0.1:\d+ is no Mooncake master: correct store.metrics_add"):
        answering(text).gauge("size")


@pytest.mark.parametrize("text", [b"[]", b"7", b"null"])
def test_a_health_that_is_no_object(answering, text):
    with pytest.raises(StoreUnavailableError, match="is no Mooncake master"):
        answering(text).is_ready()


def test_health(answering):
    assert answering(b'{"service_ready": true}').is_ready()
    assert not answering(b"{}").is_ready()
    with pytest.raises(UserError, match="/health is not valid JSON"):
        answering(b"ready").is_ready()


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"SSH-2.0\r\n", b""),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n", b"short"),
        (b"HTTP/1.0 200 OK\r\n\r\n", b"\xff"),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", b""),
    ],
    ids=range(4),
)
def test_what_is_no_answer(answering, head, body):
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        answering(body, head).list_keys()


def test_an_answer_that_is_too_long_is_not_cut(answering, monkeypatch):
    """A sweep would miss the keys that were cut off."""
    monkeypatch.setattr(admin, "MAX_ANSWER_BYTES", 10)
    assert answering(b"a\nb\nc").list_keys() == ["a", "b", "c"]
    with pytest.raises(StoreUnavailableError, match=r"more than 10 bytes"):
        answering(b"a\nb\nc\nd\ne\nf\n").list_keys()
