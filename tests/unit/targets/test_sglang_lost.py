"""Capture servers that are lost during a run: who is asked instead, who may come back, what ends the wait."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest

from lightning_dataflow.contracts import PeerFailedError, PeerGoneError, waiting
from lightning_dataflow.targets.sglang_http import CaptureFailedError, CaptureServer, ServerRefusalError
from tests.unit.targets.capture_servers import (
    PROMPTS,
    Handler,
    answer_with,
    ask,
    in_dry_runs,
    lose,
    origin,
    origin_with,
    stock,
)

pytestmark = pytest.mark.integration  # servers that come, go and hang


def test_a_dead_servers_prompts_go_to_another_and_it_is_taken_back(connect, servers, caplog):
    engine = connect()
    servers[0].dead = True
    assert len(engine.capture(PROMPTS)) == len(PROMPTS)
    assert (servers[0].num_captures, servers[1].num_captures) == (1, 1 + len(PROMPTS))
    assert caplog.text.count("lost a capture server") == 1
    servers[0].dead, servers[1].dead = False, True
    assert len(connect(urls=[servers[0].url]).capture(PROMPTS[:2])) == 2


def test_a_server_that_comes_back_with_another_model(connect, servers):
    """It counts against no prompt, and ends the run where it was the only one."""
    engine = connect(urls=[servers[0].url])
    lose(engine, servers[0])
    servers[0].alter = in_dry_runs(origin_with(target_model_version="0" * 16))
    with pytest.raises(PeerFailedError, match=r"no capture server has answered for \d+ s: .* has other weights"):
        ask(engine)


def test_all_gone(connect, servers, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.05)
    engine = connect()
    for server in servers:
        server.dead = True
    with pytest.raises(
        PeerFailedError, match=r"no capture server has answered for \d+ s: the server at http://.* does not answer.*; the"
    ):
        engine.capture(PROMPTS[:1])
    assert "waiting for a capture server to answer: the server at http://" in caplog.text
    assert "does not answer" in caplog.text


def test_what_may_have_been_stored_is_not_asked_of_another(connect, servers):
    """The server may have died after it stored the features."""
    engine = connect()
    for server in servers:
        server.rids.clear()
        server.dead = True
    for _ in servers:
        before = [server.num_captures for server in servers]
        with pytest.raises(PeerGoneError, match="does not answer"):
            ask(engine)
        assert [server.num_captures for server in servers] == before
    with pytest.raises(PeerFailedError, match="no capture server has answered for"):
        ask(engine)


def test_a_request_that_the_server_aborts(connect, servers, monkeypatch):
    def abort(self, data, reply=Handler.reply):
        if "meta_info" in data:
            data = {"meta_info": {"finish_reason": {"type": "abort", "message": "weights are updated"}}}
        reply(self, data)

    engine = connect()
    monkeypatch.setattr(Handler, "reply", abort)
    with pytest.raises(PeerGoneError, match="aborted the request: weights are updated"):
        ask(engine)


@pytest.mark.parametrize(
    ("info", "alter", "reason"),
    [
        ({"disable_radix_cache": False}, dict, "runs without --disable-radix-cache"),
        ({"max_req_input_len": 200}, dict, "came back and takes 199 tokens, this run may send 500"),
        ({}, lambda answer: {"error": "store", "message": "no Mooncake"}, "no Mooncake"),
        ({}, answer_with(error="store", message="broken"), "broken"),
    ],
)
def test_a_server_that_comes_back_worse_stays_out_and_the_others_go_on(connect, servers, caplog, info, alter, reason):
    engine = connect(absence_s=0.5)
    lose(engine, servers[0])
    servers[0].info |= info
    servers[0].alter = alter
    time.sleep(0.1)
    before = servers[1].num_captures
    assert len(engine.capture(PROMPTS)) == len(PROMPTS)
    assert "is back" not in caplog.text
    assert servers[1].num_captures - before == len(PROMPTS)
    servers[1].dead = True
    with pytest.raises((PeerGoneError, PeerFailedError)):
        ask(engine)
    with pytest.raises(PeerFailedError, match=f"no capture server has answered for .*{reason}"):
        ask(engine)


def test_a_server_that_lost_its_plugin_is_no_fault_of_the_prompt(connect, servers, monkeypatch):
    engine = connect()
    monkeypatch.setattr(Handler, "reply", lambda self, data, reply=Handler.reply: reply(self, stock(data)))
    with pytest.raises(PeerGoneError, match="does not capture") as raised:
        ask(engine)
    assert isinstance(raised.value.__cause__, ServerRefusalError)


def test_a_server_that_hangs_keeps_one_worker_at_most(connect, servers):
    engine = connect(in_flight=2)
    lose(engine, servers[0])
    servers[0].hung.set()
    try:
        time.sleep(0.1)
        servers[0].most_looks = 0
        assert len(engine.capture(PROMPTS)) == len(PROMPTS)
        assert servers[0].most_looks <= 1
    finally:
        servers[0].hung.clear()


def test_a_prompt_that_loses_every_server_is_at_fault_in_the_end(connect, servers):
    engine = connect()
    servers[0].alter = servers[1].alter = answer_with(error="store", message="codes [-600]")
    late = replace(origin(engine, [1, 2, 3]), attempt=10)
    with pytest.raises(CaptureFailedError, match=r"run:1 lost 10 servers in a row: .*codes \[-600\]"):
        engine.capture_ref([1, 2, 3], [0, 1, 1], late)


def test_servers_that_come_back_and_lose_everything_end_the_run(connect, servers):
    engine = connect(absence_s=0.7)
    for server in servers:
        server.alter = lambda answer: (
            {"error": "store", "message": "it flaps"}
            if answer.get("ref", {}).get("origin", {}).get("sample_id") == "run:1"
            else answer
        )
    with pytest.raises(PeerFailedError, match=r"no capture server has answered for \d+ s: .*it flaps"):
        for _ in range(20):
            with suppress(PeerGoneError):
                ask(engine)


def test_a_connection_that_is_closed_while_the_run_ends(servers):
    """By its own thread, at any moment."""

    class Closing:
        socks = iter([socket.socket(), None])
        sock = property(lambda self: next(self.socks))

    server = CaptureServer(servers[0].url)
    server._connections.add(closing := Closing())
    server.stop_waiting()
    assert closing.sock is None, "read once"


def test_who_waits_for_an_answer_is_freed_when_the_run_ends(connect, servers, caplog):
    engine = connect(urls=[servers[0].url], in_flight=1)
    servers[0].hung.set()
    try:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, engine, f"run:{index}") for index in range(2)]
            time.sleep(0.3)
            began = time.monotonic()
            engine.stop_waiting()
            for one in waiting:
                with pytest.raises(PeerGoneError):
                    one.result()
            assert time.monotonic() - began < 1.0
    finally:
        servers[0].hung.clear()
    assert "lost" not in caplog.text
