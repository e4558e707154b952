"""The log in a folder: what any number of writers append, every reader sees once, whole and in order."""

import json
import os
from typing import Any

import pytest

from lightning_dataflow.contracts import LogRecord, PeerTimeoutError, UserError, ref_to_json
from lightning_dataflow.control.local import log as log_module
from lightning_dataflow.control.local.log import CHUNK_BYTES, FileChannel, add_crc
from tests.records import make_ref

RUN = {"run_id": "run", "settings": {"seed": 0, "layers": [1, 3]}}


@pytest.fixture
def channel(tmp_path) -> FileChannel:
    made = FileChannel(tmp_path, segment_bytes=4096)
    made.announce(RUN)
    return made


def reader(channel: FileChannel) -> FileChannel:
    return FileChannel(channel.folder, segment_bytes=channel.segment_bytes)


def refs(*seqs: int) -> list[LogRecord]:
    return [LogRecord(kind="ref", seq=seq, ref=make_ref(seq)) for seq in seqs]


def segments(channel: FileChannel) -> list[str]:
    return sorted(path.name for path in channel.folder.glob("log-*.jsonl"))


def num_torn(caplog: pytest.LogCaptureFixture) -> int:
    """Torn lines that were skipped since the last call."""
    found = sum("skipped a torn line in" in record.getMessage() for record in caplog.records)
    caplog.clear()
    return found


def test_a_torn_line_is_waited_for_then_closed_by_the_next_writer_and_logged(channel, caplog):
    channel.publish(refs(0))
    path = channel.folder / segments(channel)[0]
    with open(path, "ab") as file:  # a writer that was killed inside its write
        file.write(path.read_bytes()[:100])
    assert [one.seq for one in channel.poll()] == [0]
    assert channel.poll() == []
    assert num_torn(caplog) == 0
    channel.publish(refs(1))
    assert [one.seq for one in channel.poll()] == [1]
    assert num_torn(caplog) == 1
    assert [one.seq for one in reader(channel).poll()] == [0, 1]
    assert num_torn(caplog) == 1


def test_an_interrupt_as_an_append_begins_keeps_nobody_from_it(channel, monkeypatch):
    def interrupt(act, purpose):
        act()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(log_module, "wait_for_others", interrupt)
        channel.publish(refs(0))
    monkeypatch.setattr("lightning_dataflow.control.local.waiting.TIMEOUT_S", 0.1)
    reader(channel).publish(refs(1))
    assert [record.seq for record in channel.poll()] == [1]


def test_nobody_else_may_write_to_the_log(tmp_path):
    before = os.umask(0)
    try:
        channel = FileChannel(tmp_path)
        channel.publish(refs(0))
    finally:
        os.umask(before)
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_mode & 0o022} == set()


def test_a_line_that_is_completed_later_is_read_then(channel, caplog):
    channel.publish(refs(0))
    path = channel.folder / segments(channel)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    late = reader(channel)
    assert late.poll() == []
    path.write_bytes(whole)
    assert [one.seq for one in late.poll()] == [0]
    assert num_torn(caplog) == 0


@pytest.mark.parametrize("num_zeros", [1, 300, 4096, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 17])
@pytest.mark.parametrize("kept", [0, 60])
def test_zeros_after_a_power_cut_are_a_torn_line(tmp_path, caplog, num_zeros, kept):
    """They stand for lines, or a part of one, that did not reach the disk."""
    channel = FileChannel(tmp_path)
    channel.announce(RUN)
    channel.publish(refs(0))
    path = channel.folder / segments(channel)[0]
    with open(path, "ab") as file:
        file.write(path.read_bytes()[:kept] + bytes(num_zeros))
    early = reader(channel)
    assert [one.seq for one in early.poll()] == [0]
    assert early.poll() == []
    reader(channel).publish(refs(1, 2))
    for each in (early, reader(channel)):
        assert [one.seq for one in each.poll()] == ([1, 2] if each is early else [0, 1, 2])
        assert num_torn(caplog) == 1
        assert each.poll() == []


def test_zeros_in_the_middle_cost_the_lines_that_they_hit(tmp_path, caplog):
    """Pages reach the disk in any order."""
    channel = FileChannel(tmp_path)
    channel.announce(RUN)
    channel.publish(refs(*range(60)))
    path = channel.folder / segments(channel)[0]
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(bytes(data))
    left = [one.seq for one in channel.poll()]
    assert left == [seq for seq in range(60) if seq in left]
    assert 40 < len(left) < 59
    assert num_torn(caplog) == 1


def test_a_torn_line_at_the_end_of_a_full_segment(channel, caplog):
    channel.publish(refs(*range(20)))
    path = channel.folder / segments(channel)[0]
    with open(path, "ab") as file:
        file.write(b'{"kind":"ref","seq":20,"ref')
    assert len(channel.poll()) == 20
    channel.publish(refs(20))
    assert len(segments(channel)) == 2
    assert [one.seq for one in channel.poll()] == [20]
    assert num_torn(caplog) == 1


def test_a_writer_killed_at_any_byte_leaves_no_damage(channel, caplog):
    """Whatever part of a line is there, the next writer marks it: it is skipped and logged, and nothing else is lost."""
    channel.publish(refs(0))
    path = channel.folder / segments(channel)[0]
    line = path.read_bytes()
    for length in range(1, len(line) - 1):
        path.write_bytes(line + line[:length])
        channel.publish(refs(1))
        assert [one.seq for one in reader(channel).poll()] == [0, 1], length
        assert num_torn(caplog) == 1, length


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line.replace(b'"seq":1', b'"seq":2', 1), "its checksum does not match"),
        (lambda line: line[:60] + b"\0" + line[61:], "its checksum does not match"),
        (lambda line: line[:-40] + b"\0" * 40, "it has no checksum"),
        (lambda line: line[40:], "its checksum does not match"),
        (lambda line: b"\xff" + line[1:-30], "it has no checksum"),
        (lambda line: line[:-30], "it has no checksum"),
        (lambda line: b'{"kind":"end","seq":1}', "it has no checksum"),
    ],
)
def test_damage_is_told_with_its_place(channel, change, reason):
    channel.publish(refs(0, 1, 2))
    path = channel.folder / segments(channel)[0]
    first, second, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join((first, change(second), third, b"")))
    late = reader(channel)
    with pytest.raises(UserError) as error:
        late.poll()
    assert str(error.value).startswith(f"{path}, the line at byte {len(first) + 1}, is damaged: {reason}; put back")


def test_a_writer_that_is_stopped_inside_a_write_blocks_for_a_bounded_time(channel, monkeypatch):
    monkeypatch.setattr("lightning_dataflow.control.local.waiting.TIMEOUT_S", 0.1)
    other = reader(channel)
    with other._exclusive():
        with pytest.raises(PeerTimeoutError, match=r"could not append .* is a process of the run stopped inside a write"):
            channel.publish(refs(0))
        assert channel.poll() == []
    channel.publish(refs(0))
    assert [one.seq for one in channel.poll()] == [0]


def test_trim_drops_whole_segments_that_are_read_and_past(channel):
    for seq in range(60):
        channel.publish(refs(seq))
    before = segments(channel)
    channel.trim(60)
    assert segments(channel) == before  # nothing is read yet
    assert len(channel.poll(5)) == 5
    channel.trim(60)
    assert segments(channel) == before  # inside the first
    while channel.poll():
        pass
    channel.trim(30)
    kept = [one.seq for one in reader(channel).poll()]
    assert kept[-30:] == list(range(30, 60))
    assert len(kept) < 60
    channel.trim(60)
    assert segments(channel) == before[-1:]  # the last is still written to
    channel.publish(refs(60))
    assert [one.seq for one in channel.poll()] == [60]


def test_files_stay_bounded_when_trimmed_as_they_are_read(channel):
    most = 0
    for seq in range(0, 600, 4):
        channel.publish(refs(*range(seq, seq + 4)))
        channel.poll()
        channel.trim(seq)
        most = max(most, sum(path.stat().st_size for path in channel.folder.iterdir()))
    assert most < 4 * 4096


def test_cards_of_another_schema_or_damaged(channel):
    card = channel.folder / "run.json"
    card.write_text(json.dumps(RUN | {"schema_version": 7}))
    with pytest.raises(UserError, match=r"schema version 7 .* this release reads 3: finish the run with the release that"):
        reader(channel)
    for damaged in ("{", "[]", "{}"):
        card.write_text(damaged)
        with pytest.raises(UserError, match=r"the card of .* is damaged .* another run_name"):
            reader(channel)


def test_a_log_of_release_0_1_is_refused_by_its_version(tmp_path):
    (tmp_path / "run.json").write_text('{"run_id": "run", "card": {}, "num_samples": 40, "seed": 0, "schema_version": 2}')
    (tmp_path / "log-00000000.jsonl").write_text('{"kind":"begin","seq":0,"crc32":"a5fe7d61"}')
    with pytest.raises(UserError) as error:
        FileChannel(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} has schema version 2 (of lightning_dataflow 0.1), this release reads 3: finish the run with the "
        "release that began it, or choose another run_name"
    )


def line(**changes: Any) -> str:
    ref = json.loads(json.dumps(ref_to_json(make_ref(0))))
    for path, value in changes.items():
        at = ref
        *parents, name = path.split("__")
        for parent in parents:
            at = at[parent]
        at[name] = value
    return json.dumps({"kind": "ref", "seq": 0, "ref": ref})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line(features__x__shape=[2, 1 << 60]), "feature x of ref run:s0 has shape"),
        (line(num_bytes=1 << 60), "the ref is damaged"),
        (line(origin__num_tokens=1 << 40), "num_tokens"),
        (line(origin__sample_id="../../etc/passwd"), "not a valid id"),
        (line(origin__run_id="a/b"), "it is of run a/b, the card is of run run: two runs were mixed"),
        (line(generation="latest"), "expected attempt-nonce"),
        (line(schema_version=4), "schema version 4 .* this release reads 3"),
        (line(features={}), "0 features"),
        ('{"kind":"ref","seq":0}', "not a sample reference"),
        ('{"kind":"drop","seq":0}', "not a log record"),
        ('{"kind":"end","seq":-1}', "not a log record"),
        ('{"kind":"end","seq":true}', "not a log record"),
        ('{"kind":"end","seq":1e9}', "not a log record"),
        ('{"kind":"skip","seq":0}', "gives no reason"),
        ('{"seq":0}', "not a log record"),
        ("x" * (1 << 21), "has a line of over 1048576 bytes"),
    ],
)
def test_what_others_write_is_checked(channel, content, message):
    content = content if len(content) > 1 << 20 else f"{add_crc(content.encode()).decode()}\n"
    (channel.folder / "log-00000000.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        assert [record.ref for record in channel.poll()] == []  # a ref is checked when it is asked for
    assert "log-00000000.jsonl" in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/log: .*choose another channel\.path"):
        FileChannel(tmp_path / "file" / "log")


def test_a_card_of_a_terabyte_is_not_read_whole(channel):
    os.truncate(channel.folder / "run.json", 1 << 40)
    with pytest.raises(UserError, match=r"the card of .* is damaged"):
        channel.card()
