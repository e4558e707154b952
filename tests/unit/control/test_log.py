"""One contract, every channel: what any number of writers append, every reader sees once, whole and in order."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import numpy as np
import pytest

from lightning_dataflow.contracts import LogRecord, PeerTimeoutError, UserError
from lightning_dataflow.contracts.log import replaces
from lightning_dataflow.control.local.log import FileChannel
from lightning_dataflow.control.log import StreamingRefChannel
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer
from tests.records import forked, make_ref

RUN = {"run_id": "run", "settings": {"seed": 0, "layers": [1, 3]}}
Opener = Callable[..., StreamingRefChannel]


@pytest.fixture(params=["file", "redis"])
def opener(request, tmp_path) -> Opener:
    """Opens the log once more, for another reader or writer; or another log by another name."""
    if request.param == "file":
        return lambda name="log": FileChannel(tmp_path / name, segment_bytes=4096)
    server: RedisServer = request.getfixturevalue("redis_run")
    return lambda name="log": RedisChannel(RedisServer(server.where, f"{server.run_id}-{name}"))


@pytest.fixture
def channel(opener) -> StreamingRefChannel:
    made = opener()
    made.announce(RUN)
    return made


def refs(*seqs: int) -> list[LogRecord]:
    return [LogRecord(kind="ref", seq=seq, ref=make_ref(seq)) for seq in seqs]


def test_every_kind_of_record_comes_back(opener, channel):
    records = [
        LogRecord(kind="begin", seq=0),
        LogRecord(kind="ref", seq=0, ref=make_ref(0)),
        LogRecord(kind="supersede", seq=0, ref=make_ref(0, attempt=2, metadata={"pass": 1}, draft_weight_version="d")),
        LogRecord(kind="skip", seq=1, reason="it failed"),
        LogRecord(kind="end", seq=2),
    ]
    channel.publish(records)
    assert opener().poll() == records
    assert channel.poll() == records
    assert channel.poll() == []


def test_a_long_reason_is_cut(channel):
    channel.publish([LogRecord(kind="skip", seq=1, reason="x" * 10_000)])
    (record,) = channel.poll()
    assert record.reason == "x" * 500


def test_polls_are_bounded_and_lose_nothing(channel):
    channel.publish(refs(*range(10)))
    assert [[one.seq for one in channel.poll(4)] for _ in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]


def test_a_reader_that_starts_late_or_again(opener, channel):
    channel.publish(refs(0, 1))
    assert [one.seq for one in channel.poll()] == [0, 1]
    channel.publish(refs(2))
    late = opener()
    assert [one.seq for one in late.poll()] == [0, 1, 2]
    assert [one.seq for one in channel.poll()] == [2]
    channel.rewind()
    assert [one.seq for one in channel.poll()] == [0, 1, 2]


def test_a_reader_behind_another_that_trims(opener, channel):
    behind = opener()
    channel.publish(refs(*range(8)))
    assert len(behind.poll(4)) == 4
    for seq in range(8, 60):
        channel.publish(refs(seq))
    while channel.poll():
        pass
    channel.trim(40)
    seqs = [one.seq for one in behind.poll()]
    assert seqs == sorted(set(seqs))
    assert seqs[-20:] == list(range(40, 60))
    assert opener().poll()[-1].seq == 59


def test_tensors_are_refused_by_the_path_to_them(channel):
    record = LogRecord(kind="ref", seq=0, ref=make_ref(0, metadata={"extra": [{"logits": np.zeros(2)}]}))
    with pytest.raises(TypeError, match=r"record\.ref\.origin\.metadata\['extra'\]\[0\]\['logits'\] is a ndarray"):
        channel.publish([*refs(1), record])
    assert channel.poll() == []
    with pytest.raises(TypeError, match=r"cannot be logged \(.* serializable: set\): records hold plain data"):
        channel.publish([LogRecord(kind="ref", seq=0, ref=make_ref(0, metadata={"extra": {1}}))])


def test_a_record_that_no_reader_would_take_is_not_written(channel):
    with pytest.raises(UserError, match=r"the record of seq 3 has 2\d{6} bytes, the limit is 1048576"):
        channel.publish([LogRecord(kind="ref", seq=3, ref=make_ref(3, metadata={"text": "x" * 2_000_000}))])
    assert channel.poll() == []


def test_which_record_of_a_seq_counts():
    first, again = LogRecord(kind="ref", seq=0, ref=make_ref(0)), LogRecord(kind="ref", seq=0, ref=make_ref(0))
    second = LogRecord(kind="supersede", seq=0, ref=make_ref(0, attempt=1))
    skip = LogRecord(kind="skip", seq=0, reason="r")
    assert not replaces(again, first)
    assert replaces(second, first)
    assert not replaces(first, second)
    assert replaces(skip, second)
    assert not replaces(second, skip)
    assert not replaces(skip, skip)


@pytest.mark.integration
def test_several_writers_do_not_mix(opener, channel):
    writers = [forked(write, opener, first) for first in range(0, 2000, 500)]
    seqs: list[int] = []
    while any(writer.is_alive() for writer in writers):
        seqs += [one.seq for one in channel.poll()]
    while found := channel.poll():
        seqs += [one.seq for one in found]
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert sorted(seqs) == list(range(2000))
    assert all(seqs[at : at + 5] == list(range(seqs[at], seqs[at] + 5)) for at in range(0, 2000, 5))


def write(opener: Opener, first: int) -> None:
    channel = opener()
    for start in range(first, first + 500, 5):
        channel.publish(refs(*range(start, start + 5)))


def test_what_is_trimmed_is_read_and_past(opener, channel):
    for seq in range(60):
        channel.publish(refs(seq))
    channel.trim(60)
    assert len(opener().poll()) == 60  # nothing is read yet
    assert len(channel.poll(10)) == 10
    channel.trim(60)
    assert [one.seq for one in opener().poll()][-50:] == list(range(10, 60))
    while channel.poll():
        pass
    channel.trim(30)
    kept = [one.seq for one in opener().poll()]
    assert kept[-30:] == list(range(30, 60))
    assert len(kept) < 60
    channel.publish(refs(60))
    assert [one.seq for one in channel.poll()] == [60]
    channel.rewind()
    assert channel.poll()[-1].seq == 60


def test_announcing_twice(opener, channel):
    opener().announce(RUN)
    other = {"run_id": "run", "settings": {"seed": 0, "layers": [1, 2]}}
    with pytest.raises(UserError, match=r"another settings\.layers \(\[1, 3\], here \[1, 2\]\): give all processes"):
        opener().announce(other)
    assert channel.card() == RUN
    with pytest.raises(TypeError, match=r"card\['weights'\] is a ndarray"):
        channel.announce(RUN | {"weights": np.zeros(1)})


def test_a_log_has_a_nonce_of_its_own(opener, channel):
    """The same for all that ask, also for the first at the same moment."""
    logs = [opener() for _ in range(8)]
    with ThreadPoolExecutor(len(logs)) as pool:
        (nonce,) = set(pool.map(lambda log: log.nonce(), logs))
    assert opener().nonce() == nonce != opener("other").nonce()


def test_all_processes_of_a_run_write_the_date_of_the_first(opener, channel):
    assert [channel.first_day(date(2025, 1, 2)), opener().first_day(date(2025, 1, 3))] == [date(2025, 1, 2)] * 2
    assert opener("other").first_day(date(2025, 1, 3)) == date(2025, 1, 3)


def test_a_date_that_is_none(opener, channel):
    channel._write_once("date", b"../../\x1b")
    with pytest.raises(UserError, match=r"the date of .* is damaged \(.*\): set data\.date"):
        opener().first_day(date(2025, 1, 2))


def test_references_of_another_run(channel):
    channel.publish([LogRecord(kind="ref", seq=0, ref=make_ref(0, run_id="other"))])
    with pytest.raises(UserError, match=r"is damaged: it is of run other, the card is of run run"):
        channel.poll()


def test_a_stream_ends_or_names_the_log(opener, channel):
    channel.publish([*refs(0, 1), LogRecord(kind="end", seq=2)])
    assert [one.seq for one in channel.stream(idle_timeout_s=1)] == [0, 1, 2]
    late = opener()
    channel.close(2)
    empty = opener("empty")
    with pytest.raises(PeerTimeoutError, match="no record came in 0 s from the producers of ") as error:
        list(empty.stream(idle_timeout_s=0.02))
    assert empty.name in str(error.value)
    assert [one.kind for one in late.stream(idle_timeout_s=1)] == ["ref", "ref", "end"]


def test_waiting_for_a_card(opener, channel):
    assert channel.wait_for_card(0.0, "a producer") == RUN
    other = opener("other")
    with pytest.raises(PeerTimeoutError, match=r"waited 0 s for a producer to announce the run in ") as error:
        other.wait_for_card(0.02, "a producer")
    assert other.name in str(error.value)
