"""A folder that a run uses stays where it is."""

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.folders import KeptFolder


def test_a_folder_that_stays_is_fine(tmp_path):
    kept = KeptFolder(tmp_path)
    (tmp_path / "more").mkdir()
    kept.check()
    KeptFolder(tmp_path / "not there yet").check()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_moved_is_noticed(tmp_path, again):
    (tmp_path / "run").mkdir()
    kept = KeptFolder(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "other")
    if again:
        (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="run was moved or removed while a run used it: put it back"):
        kept.check()
    if again:
        (tmp_path / "run").rmdir()
    (tmp_path / "other").rename(tmp_path / "run")
    kept.check()


def test_a_folder_that_became_read_only_is_noticed(tmp_path, monkeypatch):
    kept = KeptFolder(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written to any more"):
        kept.check()
    KeptFolder(tmp_path).check()
