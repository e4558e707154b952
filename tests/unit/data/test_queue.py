"""One rank's view of the log: which samples a window holds, and what is left over."""

import sys
import threading
import time

import pytest

from tests.records import rank_slice
from tests.unit.data.queues import publish, queue_of, soon, unwanted


def test_windows_come_whole_and_in_order_whatever_arrives_first(plane):
    queue = queue_of(plane)
    later = publish(plane, 6, 4, 5, 7)
    first = publish(plane, 3, 1, 0)
    soon(lambda: first.update(publish(plane, 2)))
    window = queue.get(range(4), range(4))
    assert window.refs == [first[seq] for seq in range(4)]
    assert window.num_tokens == sum(ref.num_tokens for ref in first.values())
    assert queue.get(range(4, 8), range(4, 8)).refs == [later[seq] for seq in range(4, 8)]
    assert plane.ledger.status()["train_waits"] == 1


def test_ranks_share_every_window(plane):
    refs = publish(plane, *range(12))
    ranks = [queue_of(plane) for _ in range(2)]
    for window in range(3):
        seqs = range(4 * window, 4 * window + 4)
        found = [queue.get(seqs, rank_slice(window, 4, rank, 2)) for rank, queue in enumerate(ranks)]
        assert [one.refs for one in found] == [[refs[seq] for seq in seqs[:2]], [refs[seq] for seq in seqs[2:]]]
        assert {one.num_tokens for one in found} == {sum(refs[seq].num_tokens for seq in seqs)}


def test_duplicates_are_unwanted_and_a_later_attempt_counts(plane):
    queue = queue_of(plane)
    first = publish(plane, 0, 1)
    second = publish(plane, 0)
    newer = publish(plane, 1, attempt=2)
    older = publish(plane, 1, attempt=1)
    window = queue.get(range(2), range(2))
    assert window.refs == [first[0], newer[1]]
    assert queue.recaptured == [1]
    assert unwanted(queue.ack(2)) == [second[0], first[1], older[1]]
    assert queue.unread() == []


def test_unwanted_refs_are_handed_over_once_their_window_is_trained(plane):
    queue = queue_of(plane)
    publish(plane, *range(8))
    twice = publish(plane, 1, 6)
    queue.get(range(4), range(4))
    assert unwanted(queue.ack(4)) == [twice[1]]
    assert queue.ack(4) == []
    late = publish(plane, 2, attempt=1)  # of a worker that was stopped for long
    queue.get(range(4, 8), range(4, 8))
    assert unwanted(queue.ack(8)) == [twice[6], late[2]]


def test_a_skipped_seq_keeps_its_place(plane):
    queue = queue_of(plane)
    refs = publish(plane, 0, 2)
    plane.skip([1], "too long")
    publish(plane, 1)  # giving up is final
    window = queue.get(range(3), range(3))
    assert window.refs == [refs[0], None, refs[2]]
    assert window.num_tokens == refs[0].num_tokens + refs[2].num_tokens
    assert queue.skipped == {1: "too long"}


def test_all_ranks_count_the_tokens_of_the_first_record(plane):
    early, late = queue_of(plane), queue_of(plane)
    refs = publish(plane, 0, 1)
    first = early.get(range(2), range(2))
    plane.skip([1], "lost")
    second = late.get(range(2), range(2))
    assert first.num_tokens == second.num_tokens == sum(ref.num_tokens for ref in refs.values())
    assert second.refs[1] is None


def test_skip_ids_are_not_trained_and_are_freed(plane):
    queue = queue_of(plane, skip_ids=["s1"])
    refs = publish(plane, 0, 1)
    assert queue.get(range(2), range(2)).refs == [refs[0], None]
    assert queue.skipped == {1: "listed in skip_ids"}
    assert unwanted(queue.ack(2)) == [refs[1]]


def test_a_resumed_queue_drops_what_is_before_its_start(plane):
    queue = queue_of(plane, start=4)
    old = publish(plane, *range(4))
    publish(plane, *range(4, 8))
    queue.catch_up()
    assert unwanted(queue.take_unwanted()) == list(old.values())
    assert [ref.origin.source_id for ref in queue.get(range(4, 8), range(4, 8)).refs] == ["s4", "s5", "s6", "s7"]
    assert len(queue.unread()) == 4


def test_memory_holds_what_is_in_flight(plane):
    queue = queue_of(plane)
    for seq in range(0, 400, 4):
        publish(plane, *range(seq, seq + 4))
        publish(plane, seq, attempt=1)
        queue.get(range(seq, seq + 4), range(seq, seq + 2))
        queue.ack(seq + 4)
    held = {name: len(value) for name, value in vars(queue).items() if isinstance(value, dict | list | set)}
    assert held.pop("recaptured") == 100
    assert set(held.values()) == {0}


def test_a_window_may_be_asked_for_again_until_it_is_trained(plane):
    queue = queue_of(plane)
    publish(plane, 0, 1)
    assert queue.get(range(2), range(2)) == queue.get(range(2), range(2))


@pytest.mark.integration
def test_windows_are_read_while_others_are_acknowledged(plane):
    """By two threads, which Python switches between as often as it can."""
    refs = publish(plane, *range(6000))
    queue, errors, read = queue_of(plane), [], [0]

    def read_windows() -> None:
        try:
            for first in range(0, 6000, 20):
                seqs = range(first, first + 20)
                assert queue.get(seqs, seqs).refs == [refs[seq] for seq in seqs]
                read[0] = seqs.stop
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=read_windows, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while thread.is_alive():
            assert queue.ack(max(0, read[0] - 1000)) == []
            assert time.monotonic() < deadline
    finally:
        sys.setswitchinterval(interval)
    assert (errors, read) == ([], [6000])


def test_acknowledging_beside_a_reading_thread(plane):
    queue = queue_of(plane)

    def write() -> None:
        for seq in range(0, 400, 20):
            publish(plane, *range(seq, seq + 20))

    writer = threading.Thread(target=write)
    trained: list[int] = []
    reader = threading.Thread(
        target=lambda: [trained.append(queue.get(range(s, s + 4), range(s, s + 4)) and s + 4) for s in range(0, 400, 4)]
    )
    writer.start()
    reader.start()
    while reader.is_alive():
        if trained:
            assert queue.ack(trained[-1]) == []
    queue.ack(400)
    assert queue.unread() == []
