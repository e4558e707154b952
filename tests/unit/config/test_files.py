import pytest

from lightning_dataflow.config.files import read_skip_ids
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
