"""What an SGLang server says of its speculation, and addresses that are none."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from lightning_dataflow.contracts import PeerFailedError, UserError
from lightning_dataflow.evaluation.acceptance import Decoding
from lightning_dataflow.evaluation.judges.sglang_server import SGLangDecoder, read_counts, sampling_params
from tests.sglang.speculating import INFO, SpeculatingServer

pytestmark = pytest.mark.integration  # a server and its clients


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
        ({}, r"answers \(KeyError\('meta_info'\)\): this backend reads the answers of SGLang 0\.5\.23"),
        (answer(), "generated without speculation, its answer has no spec_verify_ct"),
        (
            answer(spec_verify_ct=6, spec_num_correct_drafts=8, spec_correct_drafts_histogram=[2, 1]),
            r"6 verifications, 8 correct drafts, but a histogram of \[2, 1\]",
        ),
        (answer(spec_verify_ct=6, spec_num_correct_drafts=8), r"but a histogram of \[\]"),
        (answer(spec_verify_ct=6), r"KeyError\('spec_num_correct_drafts'\).* answers of SGLang 0\.5\.23"),
        (answer(spec_verify_ct=6, spec_num_correct_drafts=8, spec_correct_drafts_histogram=[None]), r"TypeError"),
        ({"meta_info": {"completion_tokens": None}}, r"TypeError"),
    ],
)
def test_answers_that_cannot_be_counted(found, message):
    with pytest.raises(UserError, match=f"the server.*{message}"):
        read_counts(found, 3, "the server")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"speculative_num_draft_tokens": None}, r"cannot read what .* answers \(TypeError.* SGLang 0\.5\.23"),
        ({"speculative_num_draft_tokens": 1}, r"does not speculate"),
        ({"speculative_eagle_topk": 4}, r"cannot read what .* answers \(KeyError\('speculative_num_steps'\)"),
    ],
)
def test_a_server_of_another_version_is_one_line(info, message):
    with SpeculatingServer(info=INFO | info) as server, pytest.raises(UserError, match=message) as raised:
        SGLangDecoder(url=server.url).evaluate([[1]], Decoding(max_new_tokens=4), stop_token_ids=[])
    assert "\n" not in str(raised.value)


def test_an_answer_without_tokens_is_one_line():
    with (
        SpeculatingServer(answer={"output_ids": None}) as server,
        pytest.raises(UserError, match=r"cannot read what .* answers \(TypeError") as raised,
    ):
        SGLangDecoder(url=server.url).evaluate([[1]], Decoding(max_new_tokens=4), stop_token_ids=[])
    assert "\n" not in str(raised.value)


@pytest.mark.integration
def test_the_first_request_of_each_server_is_not_timed():
    prompts = [[7, 8], [9], [10]]
    plain = {"speculative_algorithm": None}
    with SpeculatingServer(first_s=2) as server, SpeculatingServer(first_s=2, info=plain, meta={}) as alone:
        decoder, baseline = SGLangDecoder(url=server.url), SGLangDecoder(url=alone.url)
        report = decoder.evaluate(prompts, Decoding(max_new_tokens=16, batch_size=2), stop_token_ids=[], plain=baseline)
    for one in (server, alone):
        assert [body["input_ids"] for body in one.requests] == [prompts[:1], prompts[:2], prompts[2:]]
        assert [body["sampling_params"]["max_new_tokens"] for body in one.requests] == [8, 16, 16]
    assert (report.num_prompts, report.num_tokens, report.num_drafts) == (3, 48, 6), "the first request counts nothing"
    assert report.accepted_per_position == (3, 3, 3)
    assert report.seconds < 1 and report.plain_seconds < 1


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("127.0.0.1:9", UserError, "is no address of a server, expected http://HOST:PORT"),
        ("http://127.0.0.1:9", PeerFailedError, "the server at http://127.0.0.1:9 does not answer"),
    ],
)
def test_addresses_where_no_server_is(url, error, message):
    with pytest.raises(error, match=message) as raised:
        SGLangDecoder(url=url).evaluate([[1]], Decoding(max_new_tokens=4), stop_token_ids=[])
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
            SGLangDecoder(url=url, api_key="the key").evaluate([[1]], Decoding(max_new_tokens=4), stop_token_ids=[])
        server.shutdown()
    assert "\n" not in str(raised.value) and "the key" not in str(raised.value)


def test_a_server_is_told_to_ignore_ends_only_where_none_is_given():
    """With `ignore_eos`, SGLang ignores `stop_token_ids` too."""
    assert sampling_params(4, 0.0, [7]) == {"max_new_tokens": 4, "temperature": 0.0, "stop_token_ids": [7]}
    assert sampling_params(4, 0.0, []) == {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
