"""Which server is asked, and when all of them count as gone."""

import time

import pytest

from lightning_dataflow.contracts import PeerFailedError
from lightning_dataflow.targets import sglang_pool
from lightning_dataflow.targets.sglang_http import CaptureServer
from lightning_dataflow.targets.sglang_pool import Member, ServerPool

ABSENCE_S = 0.3


@pytest.fixture
def pool(monkeypatch) -> ServerPool:
    """Of one server, which `admit` accepts whenever it is probed."""
    monkeypatch.setattr(sglang_pool, "PROBE_PAUSE_S", 0.001)
    monkeypatch.setattr(sglang_pool, "POLL_S", 0.001)
    member = Member(CaptureServer("http://127.0.0.1:9"), CaptureServer("http://127.0.0.1:9"))
    return ServerPool([member], admit=lambda server: None, in_flight=3, absence_s=ABSENCE_S)


def refuse_one(pool: ServerPool, *, answered: int) -> None:
    """Of several requests at a time the first is refused at once; others are answered afterwards."""
    members = [pool.take() for _ in range(answered + 1)]
    pool.give_back(members.pop(), lost="answered 503: busy")
    time.sleep(0.01)
    for member in members:
        pool.give_back(member)


@pytest.mark.integration
def test_a_busy_server_that_answers_most_requests_is_not_gone(pool):
    start = time.monotonic()
    while time.monotonic() - start < 3 * ABSENCE_S:
        refuse_one(pool, answered=2)


def test_a_server_that_answers_nothing_but_probes_is_gone(pool):
    start = time.monotonic()
    with pytest.raises(PeerFailedError, match="no capture server has answered for 0 s: answered 503: busy"):
        while True:
            refuse_one(pool, answered=0)
    assert ABSENCE_S < time.monotonic() - start < 10 * ABSENCE_S
