"""One rank's view of the log."""

import sys
import threading
import time
from collections.abc import Sequence

import pytest

from lightning_dataflow.contracts import LogRecord, PeerFailedError, PeerTimeoutError, SampleRef, UserError
from lightning_dataflow.control import ControlPlane
from lightning_dataflow.data import StreamingRefQueue, queue as queue_module
from lightning_dataflow.data.queue import QueueCancelledError
from tests.records import WIDE, begin, make_ref, memory_plane, rank_slice


@pytest.fixture
def plane(tmp_path) -> ControlPlane:
    made = memory_plane(tmp_path)
    made.log.announce({"run_id": "run"})
    begin(made)
    return made


@pytest.fixture(autouse=True)
def look_at_peers_at_once(monkeypatch):
    monkeypatch.setattr(queue_module, "CHECK_PEERS_S", 0.0)


def queue_of(plane: ControlPlane, **options) -> StreamingRefQueue:
    """A reader of its own."""
    reader = memory_plane(plane.log.name)
    return StreamingRefQueue(
        ControlPlane(run_id="run", ledger=plane.ledger, channel=reader.log),
        **{"idle_timeout_s": 5.0} | options,
    )


def publish(plane: ControlPlane, *seqs: int, attempt: int = 0):
    refs = {seq: make_ref(seq, attempt) for seq in seqs}
    kind = "supersede" if attempt else "ref"
    plane.log.publish([LogRecord(kind=kind, seq=seq, ref=ref) for seq, ref in refs.items()])
    return refs


def lease_and_publish(plane: ControlPlane, group: int = 4):
    lease = plane.ledger.lease("producer-0", group=group, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=60)
    refs = {seq: make_ref(seq, lease.attempt) for seq in lease.wanted}
    assert plane.publish(lease, refs) == list(refs)
    return refs


def soon(action, after_s: float = 0.05) -> None:
    timer = threading.Timer(after_s, action)
    timer.daemon = True
    timer.start()


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


def unwanted(records: Sequence[LogRecord]) -> list[SampleRef | None]:
    return [record.ref for record in records]


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


def test_a_lost_sample_is_captured_again(plane):
    queue = queue_of(plane)
    refs = lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[2]
    again = {}
    soon(lambda: again.update(lease_and_publish(plane)))
    replaced = queue.fail(2, ref, "gone")
    assert replaced == again[2]
    assert replaced.origin.attempt == 1
    assert queue.recaptured == [2]
    assert unwanted(queue.ack(4)) == [refs[2]]


def test_the_new_ref_came_before_the_loss_was_noticed(plane):
    """A lease that expired between append and commit: both attempts are in the log when the older is read."""
    queue = queue_of(plane)
    publish(plane, 0, 1)
    ref = queue.get(range(2), range(2)).refs[0]
    newer = publish(plane, 0, attempt=1)
    publish(plane, 2, 3)
    queue.get(range(2, 4), range(2, 4))  # reads on, ahead of the trainer
    assert queue.fail(0, ref, "gone") == newer[0]


def test_a_sample_that_is_lost_too_often_is_skipped_for_every_reader(plane):
    queue = queue_of(plane)
    lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[0]
    for _ in range(2):
        soon(lambda: lease_and_publish(plane))
        ref = queue.fail(0, ref, "gone")
        assert ref is not None
    assert queue.fail(0, ref, "gone for good") is None
    assert queue.skipped == {0: "gone for good"}
    other = queue_of(plane)
    assert other.get(range(4), range(4)).refs[0] is None
    assert other.skipped == {0: "gone for good"}


def test_what_cannot_be_captured_again_is_skipped_at_once(plane):
    queue = queue_of(plane)
    lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[0]
    assert queue.fail(0, ref, "damaged", retryable=False) is None


def test_another_rank_gave_the_sample_up_while_this_one_waited(plane):
    queue = queue_of(plane)
    lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[0]
    soon(lambda: plane.skip([0], "capture failed: too long"))
    assert queue.fail(0, ref, "gone") is None
    assert queue.skipped == {0: "capture failed: too long"}


def test_forgotten_samples_are_waited_for(plane):
    queue = queue_of(plane)
    publish(plane, 0, 1)
    queue.catch_up()
    queue.forget([1])
    again = {}
    soon(lambda: again.update(publish(plane, 1, attempt=1)))
    assert queue.get(range(2), range(2)).refs[1] == again[1]


def test_a_producer_that_falls_silent_is_named(plane):
    queue = queue_of(plane, idle_timeout_s=0.05)
    with pytest.raises(
        PeerTimeoutError, match=r"no sample came for 0 s; waiting for 2 of the 2 samples of the window at seq 0"
    ):
        queue.get(range(2), range(2))
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


def test_acknowledging_beside_a_reading_thread(plane):
    queue = queue_of(plane)

    def write() -> None:
        for seq in range(0, 2000, 20):
            publish(plane, *range(seq, seq + 20))

    writer = threading.Thread(target=write)
    trained: list[int] = []
    reader = threading.Thread(
        target=lambda: [trained.append(queue.get(range(s, s + 4), range(s, s + 4)) and s + 4) for s in range(0, 2000, 4)]
    )
    writer.start()
    reader.start()
    while reader.is_alive():
        if trained:
            assert queue.ack(trained[-1]) == []
    queue.ack(2000)
    assert queue.unread() == []
