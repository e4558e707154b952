"""Files and data sets that records come from; messages name the file and the line."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts import sources
from lightning_dataflow.prompts.sources import read_records, without_nulls

ROWS = [{"text": "one"}, {"text": "zwei ü"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def data(path, **options) -> list:
    return [record.data for record in read_records(str(path), **options)]


def broken(path, **options) -> list[str]:
    return [str(record.data) for record in read_records(str(path), **options) if isinstance(record.data, UserError)]


def wheres(path, **options) -> list[str]:
    return [record.where for record in read_records(str(path), **options)]


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def zstd(content: str) -> bytes:
    return bytes(pyarrow.compress(content.encode(), codec="zstd", asbytes=True))


def parquet(file: Path, rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL.replace("\n", "\r\n\n")),
        ("a.JSONL", JSONL.rstrip()),
        ("bom.jsonl", "\ufeff" + JSONL),
        ("lines.json", JSONL),
        ("list.json", json.dumps(ROWS)),
        ("list.json", "\ufeff" + json.dumps(ROWS, indent=1, ensure_ascii=False)),
        ("splits.json", json.dumps({"test": [], "train": ROWS})),
        ("a.jsonl.gz", gzip.compress(("\ufeff" + JSONL).encode(), mtime=0)),
        ("list.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.jsonl.zst", zstd(JSONL)),
        ("list.json.zstd", zstd("\ufeff" + json.dumps(ROWS))),
        ("no_suffix", JSONL),
    ],
)
def test_files_of_json(tmp_path, name, content):
    assert data(write(tmp_path / name, content)) == ROWS


def test_one_object_is_one_record(tmp_path):
    assert data(write(tmp_path / "one.json", json.dumps(ROWS[0], indent=1))) == ROWS[:1]


def test_parquet_and_its_nulls(tmp_path):
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"city": "Oslo"}}]}
    other = {"role": "assistant", "content": "a", "tool_calls": [{"name": "g", "arguments": {"content": "b"}}]}
    rows = [{"messages": [turn], "tools": "[]"}, {"messages": [other]}]
    file = parquet(tmp_path / "a.parquet", rows)
    assert data(file) == rows
    assert wheres(file) == [f"{file}, row 1", f"{file}, row 2"]


def test_only_a_message_may_have_null_content():
    assert without_nulls({"role": "user", "content": None, "name": None}) == {"role": "user", "content": None}
    assert without_nulls([{"a": {"content": None, "b": [None, 1]}}]) == [{"a": {"b": [None, 1]}}]


def test_every_line_is_named_though_blank_ones_are_not_records(tmp_path):
    file = write(tmp_path / "a.jsonl", "\n" + JSONL.replace("\n", "\n\n"))
    assert wheres(file) == [f"{file}, line 2", f"{file}, line 4"]
    listed = write(tmp_path / "list.json", json.dumps(ROWS))
    assert wheres(listed) == [f"{listed}, record 1", f"{listed}, record 2"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "1', "not JSON (Invalid control character at column 12); expected one JSON object a line, correct"),
        ('{"text" 1}', "not JSON (Expecting ':' delimiter at column 9); expected one JSON object a line, correct"),
        ("[" * 100_000, "lists or objects are nested too deeply; expected one JSON object a line, correct"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "lists or objects are nested too deeply; expected one JSON object a line"),
        ('{"input_ids": [' + "9" * 5000 + "]}", "a number has more than 4300 digits; expected one JSON object a line"),
        ("[1, 2]", "a JSON list; expected one JSON object a line"),
        ('"text"', "a JSON str; expected one JSON object a line"),
        (json.dumps({"text": "x" * 200}), "longer than 100 characters; split or remove the record"),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_broken_line_among_good_ones(tmp_path, monkeypatch, line, reason):
    if "longer" in reason:
        monkeypatch.setattr(sources, "LARGEST_RECORD", 100)
    file = write(tmp_path / "a.jsonl", f"{JSONL}{line}\n{JSONL}")
    (message,) = broken(file)
    assert message.startswith(f"{file}, line 3: {reason}")
    assert "\n" not in message
    assert [row for row in data(file) if not isinstance(row, UserError)] == [*ROWS, *ROWS]


def test_records_of_many_levels(tmp_path):
    deep = '{"a": ' + "[" * 99 + "]" * 99 + "}"
    assert broken(write(tmp_path / "a.jsonl", deep)) == []


@pytest.mark.parametrize("after", ["", "\n", "\n\n \n"])
def test_a_list_on_one_line_may_be_longer_than_a_record(tmp_path, monkeypatch, after):
    monkeypatch.setattr(sources, "LARGEST_RECORD", 20)
    assert data(write(tmp_path / "list.json", json.dumps(ROWS) + after)) == ROWS


def test_a_broken_record_of_a_list(tmp_path):
    file = write(tmp_path / "list.json", json.dumps([*ROWS, 3]))
    assert broken(file) == [f"{file}, record 3: a JSON int; expected an object"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8 text (invalid start byte at byte 10): convert it to UTF-8"),
        ("a.jsonl", JSONL.encode("utf-16"), "is not UTF-8 text"),
        ("a.json", "{]", "expected a list of records, or one JSON object a line"),
        ("a.json", "3", "a JSON int; expected a list of records, or one JSON object a line"),
        ("a.jsonl.gz", JSONL, "cannot decompress"),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)[:-9], "cannot decompress"),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)[:10] + b"\xff" * 40, "cannot decompress"),
        ("a.jsonl.zst", JSONL, "cannot decompress"),
        ("a.parquet", JSONL, "is not a Parquet file"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, content, message):
    file = write(tmp_path / name, content)
    with pytest.raises(UserError) as raised:
        data(file)
    assert message in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_names_of_splits_is_read_whole(tmp_path):
    write(tmp_path / "b/two.jsonl", json.dumps(ROWS[1]))
    write(tmp_path / "a.json", json.dumps(ROWS[:1]))
    write(tmp_path / "README.md", "# Data")
    write(tmp_path / ".cache/huggingface/three.json", "{}")
    write(tmp_path / "._a.json", b"\x00")
    assert data(tmp_path) == ROWS
    assert data(tmp_path, split="validation") == ROWS


def test_a_folder_with_names_of_splits(tmp_path):
    parquet(tmp_path / "data/train-00000-of-00002.parquet", ROWS[:1])
    parquet(tmp_path / "data/train-00001-of-00002.parquet", ROWS[1:])
    write(tmp_path / "data/dev.jsonl", '{"text": "dev"}')
    write(tmp_path / "dataset_infos.json", "{}")
    assert data(tmp_path) == ROWS
    assert data(tmp_path, split="validation") == [{"text": "dev"}]


def test_patterns(tmp_path):
    for index, row in enumerate(ROWS):
        write(tmp_path / f"part-{index}.jsonl", json.dumps(row))
    write(tmp_path / "other.jsonl", "{}")
    assert data(tmp_path / "part-*.jsonl") == ROWS
    assert data(tmp_path / "**/part-[01].jsonl") == ROWS


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere-*.jsonl", "nowhere/a.parquet"])
def test_a_missing_file_names_its_setting(name):
    with pytest.raises(UserError, match=r"nowhere.* does not exist: evaluate.data takes a file"):
        read_records(name, setting="evaluate.data")


def test_data_sets_saved_to_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": None}], "tools": None}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "several")
    expected = [{"messages": [{"role": "user", "content": None}]}]
    assert data(tmp_path / "one") == expected
    assert data(tmp_path / "several", split="test") == expected
    assert wheres(tmp_path / "one") == [f"{tmp_path / 'one'}, record 1"]
    with pytest.raises(UserError, match=r"cannot load data set .*several, split dev: "):
        data(tmp_path / "several", split="dev")


def test_a_data_set_that_cannot_be_reached():
    pytest.importorskip("datasets")
    with pytest.raises(
        UserError, match=r"cannot load data set nobody/nothing, split train: .*; set data.path to"
    ) as raised:
        data("nobody/nothing")
    assert "\n" not in str(raised.value)


def test_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"data.path=nobody/nothing is no file, .*: run `pip install 'lightning-dataflow"):
        data("nobody/nothing")
    with pytest.raises(UserError, match=r"cannot read .*a.parquet: run `pip install 'lightning-dataflow\[datasets\]'`, or"):
        data(write(tmp_path / "a.parquet", b""))
