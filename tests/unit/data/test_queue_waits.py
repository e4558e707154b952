"""Whom one rank waits for at the log, and what ends the wait."""

import time

import pytest

from lightning_dataflow.contracts import LogRecord, PeerFailedError, PeerTimeoutError, UserError, waiting
from lightning_dataflow.data.queue import QueueCancelledError
from tests.unit.data.queues import lease_and_publish, publish, queue_of, soon


def test_a_producer_that_falls_silent_is_named(plane, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.01)
    queue = queue_of(plane, idle_timeout_s=0.05)
    with pytest.raises(
        PeerTimeoutError, match=r"no sample came for 0 s; waiting for 2 of the 2 samples of the window at seq 0"
    ):
        queue.get(range(2), range(2))
    assert "waiting for 2 of the 2 samples of the window at seq 0 from a producer, none has started" in caplog.text
    plane.ledger.report("producer-0", "capturing seq 0")
    publish(plane, 0)
    with pytest.raises(
        PeerTimeoutError, match=r"1 of the 2 samples .* from producer-0 on .* \(capturing seq 0, seen 0 s ago\)"
    ):
        queue.get(range(2), range(2))
    assert queue.waiting_for == "1 of the 2 samples of the window at seq 0"


@pytest.mark.integration
def test_records_keep_the_patience_up(plane):
    queue = queue_of(plane, idle_timeout_s=0.5)
    for at in range(1, 6):
        soon(lambda at=at: publish(plane, at), 0.2 * at)
    soon(lambda: publish(plane, 0), 1.2)
    assert queue.get(range(2), range(2)).refs


def test_a_failed_producer_ends_the_wait(plane):
    soon(lambda: plane.ledger.report("producer-0", "CUDA out of memory", failed=True))
    with pytest.raises(PeerFailedError, match="producer-0: CUDA out of memory"):
        queue_of(plane).get(range(2), range(2))


def test_another_rank_that_ends_the_run_ends_the_wait(plane):
    queue = queue_of(plane)
    lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[0]
    plane.ledger.finish("failed: loss is nan")
    with pytest.raises(
        PeerFailedError, match=r"the run was ended \(failed: loss is nan\) while this process waited for 1 of"
    ):
        queue.fail(0, ref, "freed by the rank that ended")
    reader = queue_of(plane)
    reader.catch_up()
    assert reader.skipped == {}


def test_a_log_that_ends_before_the_window(plane):
    queue = queue_of(plane)
    publish(plane, 0, 1, 2)
    plane.log.close(3)
    assert queue.get(range(2), range(2)).refs
    with pytest.raises(UserError, match=r"ends at seq 3, the next window needs seqs up to 4: lower trainer\.max_steps"):
        queue.get(range(2, 4), range(2, 4))
    plane.log.publish([LogRecord(kind="begin", seq=0)])  # a new fit
    publish(plane, 3)
    assert queue.get(range(2, 4), range(2, 4)).refs


def test_cancelled_while_each_look_finds_news(plane, monkeypatch):
    """The window lacks one sample, and others keep coming."""
    queue = queue_of(plane)
    log, others = queue._plane.log, iter(range(1, 50))
    poll = log.poll

    def poll_with_news():
        publish(plane, next(others))  # StopIteration ends a wait that goes on
        return poll()

    monkeypatch.setattr(log, "poll", poll_with_news)
    queue.cancel()
    with pytest.raises(QueueCancelledError):
        queue.get(range(4), range(4))


def test_cancelled_from_another_thread(plane):
    queue = queue_of(plane)
    soon(queue.cancel)
    start = time.monotonic()
    with pytest.raises(QueueCancelledError):
        queue.get(range(2), range(2))
    assert time.monotonic() - start < 2


def test_a_pump_is_called_instead_of_waiting(plane):
    calls: list[int] = []

    def pump() -> bool:
        publish(plane, len(calls))
        calls.append(0)
        return True

    assert len(queue_of(plane, pump=pump).get(range(3), range(3)).refs) == 3
    assert len(calls) == 3
