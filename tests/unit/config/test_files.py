from datetime import date

import pytest

from lightning_dataflow.config.files import read_date, read_skip_ids, write_date
from lightning_dataflow.contracts import UserError


def test_ids_stand_one_a_line(tmp_path):
    (tmp_path / "bad.txt").write_text("00000074\n\n  web:12#3 \n00000074\n")
    assert read_skip_ids(str(tmp_path / "bad.txt")) == {"00000074", "web:12#3"}
    assert read_skip_ids(None) == frozenset()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb c\n", "data.skip_ids={path}, line 2: source id 'b c' is not a valid id"),
        (b'["a"]\n', "data.skip_ids={path}, line 1: source id"),
        (b"\xff\n", "cannot read data.skip_ids={path}: it is not UTF-8 text"),
        (None, "cannot read data.skip_ids={path}: No such file or directory"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "ids"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_skip_ids(str(path))
    assert str(refused.value).startswith(message.format(path=path))


def test_a_run_keeps_the_day_on_which_it_began(tmp_path):
    folder = tmp_path / "run"
    assert read_date(None, folder) == date.today()
    write_date(folder)
    (folder / "date.txt").write_text("2025-01-02")
    write_date(folder)  # on a resume
    assert [path.name for path in folder.iterdir()] == ["date.txt"]
    assert read_date(None, folder) == date(2025, 1, 2)
    assert read_date("2024-07-26", folder) == date(2024, 7, 26)
    with pytest.raises(UserError, match=r"data\.date=x is no date: give YYYY-MM-DD"):
        read_date("x", folder)
