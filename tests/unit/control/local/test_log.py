"""The log in a folder: what any number of writers append, every reader sees once, whole and in order."""

import json
from typing import Any

import pytest

from lightning_dataflow.contracts import LogRecord, PeerTimeoutError, UserError, ref_to_json
from lightning_dataflow.control.local.lines import add_crc
from lightning_dataflow.control.local.log import FileChannel
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


def test_a_torn_line_is_waited_for_then_closed_by_the_next_writer_and_counted(channel):
    channel.publish(refs(0))
    path = channel.folder / segments(channel)[0]
    with open(path, "ab") as file:  # a writer that was killed inside its write
        file.write(path.read_bytes()[:100])
    assert [one.seq for one in channel.poll()] == [0]
    assert channel.poll() == []
    assert channel.num_torn == 0
    channel.publish(refs(1))
    assert [one.seq for one in channel.poll()] == [1]
    assert channel.num_torn == 1
    late = reader(channel)
    assert [one.seq for one in late.poll()] == [0, 1]
    assert late.num_torn == 1


def test_a_line_that_is_completed_later_is_read_then(channel):
    channel.publish(refs(0))
    path = channel.folder / segments(channel)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    late = reader(channel)
    assert late.poll() == []
    path.write_bytes(whole)
    assert [one.seq for one in late.poll()] == [0]
    assert late.num_torn == 0


def test_a_torn_line_at_the_end_of_a_full_segment(channel):
    channel.publish(refs(*range(20)))
    path = channel.folder / segments(channel)[0]
    with open(path, "ab") as file:
        file.write(b'{"kind":"ref","seq":20,"ref')
    assert len(channel.poll()) == 20
    channel.publish(refs(20))
    assert len(segments(channel)) == 2
    assert [one.seq for one in channel.poll()] == [20]
    assert channel.num_torn == 1


def test_a_writer_killed_at_any_byte_leaves_no_damage(channel):
    """Whatever part of a line is there, it is a torn one: skipped and counted, and nothing else is lost."""
    channel.publish(refs(0))
    path = channel.folder / segments(channel)[0]
    line = path.read_bytes()
    for length in range(1, len(line) - 1):
        path.write_bytes(line + line[:length] + b"\n" + line)
        late = reader(channel)
        assert [one.seq for one in late.poll()] == [0, 0], length
        assert late.num_torn == 1, length


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line.replace(b'"seq":1', b'"seq":2', 1), "its checksum does not match"),
        (lambda line: line[:60] + b"\0" + line[61:], "its checksum does not match"),
        (lambda line: line[:-40] + b"\0" * 40, "it has no checksum"),
        (lambda line: line[40:], "its checksum does not match"),
        (lambda line: b"\xff" + line[1:-30], "it has no checksum"),
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
    assert str(error.value).startswith(f"{path} is damaged in the line at byte {len(first) + 1}: {reason}; put back")


def test_a_writer_that_is_stopped_inside_a_write_blocks_for_a_bounded_time(channel, monkeypatch):
    monkeypatch.setattr("lightning_dataflow.control.local.log.LOCK_TIMEOUT_S", 0.1)
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
    assert len(channel.poll(10)) == 10
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
    with pytest.raises(UserError, match="schema version 7, this release reads 2"):
        reader(channel)
    for damaged in ("{", "[]", "{}"):
        card.write_text(damaged)
        with pytest.raises(UserError, match=r"run\.json is damaged .* another run_name"):
            reader(channel)


def line(**changes: Any) -> str:
    ref = json.loads(json.dumps(ref_to_json(make_ref(0))))
    for path, value in changes.items():
        at = ref
        *parents, name = path.split("__")
        for parent in parents:
            at = at[parent]
        at[name] = value
    return json.dumps({"kind": "ref", "seq": 0, "ref": ref}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line(features=f"x/float32/{1 << 60}"), "a size of feature x"),
        (line(num_bytes=1 << 60), "the ref is damaged"),
        (line(origin__num_tokens=1 << 40), "num_tokens"),
        (line(origin__sample_id="../../etc/passwd"), "not a valid id"),
        (line(origin__run_id="a/b"), "not a valid id"),
        (line(generation="latest"), "expected attempt-nonce"),
        (line(schema_version=3), "schema version 3, this release reads 2"),
        (line(features={}), "0 features"),
        ('{"kind":"ref","seq":0}\n', "not a sample reference"),
        ('{"kind":"drop","seq":0}\n', "not a log record"),
        ('{"kind":"end","seq":-1}\n', "not a log record"),
        ('{"kind":"end","seq":true}\n', "not a log record"),
        ('{"kind":"end","seq":1e9}\n', "not a log record"),
        ('{"kind":"skip","seq":0}\n', "gives no reason"),
        ("{}\n", "not a log record"),
        ("x" * (1 << 21), "has a line of over 1048576 bytes"),
    ],
)
def test_what_others_write_is_checked(channel, content, message):
    content = content if len(content) > 1 << 20 else add_crc(content.encode()).decode()
    (channel.folder / "log-00000000.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        channel.poll()
    assert "log-00000000.jsonl" in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/log: .*choose another channel\.path"):
        FileChannel(tmp_path / "file" / "log")
