"""What an SGLang server says of its speculation, and addresses that are none."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from lightning_dataflow.contracts import PeerFailedError, UserError
from lightning_dataflow.evaluation import SGLangDecoder
from lightning_dataflow.evaluation.sglang_server import read_counts


def answer(**meta):
    return {"meta_info": {"completion_tokens": 9, **meta}}


def test_counts_by_position_come_from_the_histogram():
    found = answer(spec_verify_ct=6, spec_num_correct_drafts=8, spec_correct_drafts_histogram=[2, 1, 2, 1])
    assert read_counts(found, 4, "the server") == (6, [4, 3, 1, 0])


def test_a_request_that_its_first_token_ended_has_no_drafts():
    assert read_counts({"meta_info": {"completion_tokens": 1}}, 3, "the server") == (0, [0, 0, 0])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "answered without meta_info"),
        (answer(), "generated without speculation, its answer has no spec_verify_ct"),
        (
            answer(spec_verify_ct=6, spec_num_correct_drafts=8, spec_correct_drafts_histogram=[2, 1]),
            r"6 verifications, 8 correct drafts, but a histogram of \[2, 1\]",
        ),
        (answer(spec_verify_ct=6, spec_num_correct_drafts=8), r"but a histogram of \[\]"),
    ],
)
def test_answers_that_cannot_be_counted(found, message):
    with pytest.raises(UserError, match=f"the server.*{message}"):
        read_counts(found, 3, "the server")


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("127.0.0.1:9", UserError, "is no address of a server, expected http://HOST:PORT"),
        ("http://127.0.0.1:9", PeerFailedError, "the server at http://127.0.0.1:9 does not answer"),
    ],
)
def test_addresses_where_no_server_is(url, error, message):
    with pytest.raises(error, match=message) as raised:
        SGLangDecoder(url=url).evaluate([[1]], max_new_tokens=4, stop_token_ids=[])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", "is no SGLang server"),
        (200, b'{"status": "ok"}', "is no SGLang server"),
        (401, b"no", r"refuses our key \(401\): set target.api_key_file"),
        (500, b"line one\nline two", "answered 500: line one line two"),
    ],
)
def test_what_answers_is_no_server_of_ours(status, body, message):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=message) as raised:
            SGLangDecoder(url=url, api_key="the key").evaluate([[1]], max_new_tokens=4, stop_token_ids=[])
        server.shutdown()
    assert "\n" not in str(raised.value) and "the key" not in str(raised.value)
