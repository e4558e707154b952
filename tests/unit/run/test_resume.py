"""`ckpt_path=last`, `auto` and a path."""

import os

import pytest

from lightning_dataflow.checkpoints.markers import mark_complete
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.resume import invalidate_later_checkpoints, resolve_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        path = tmp_path / "checkpoints" / f"step-{step:06d}.ckpt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(1000))
        mark_complete(path, step)
    return tmp_path


def cut_short(folder, *steps):
    for step in steps:
        os.truncate(folder / "checkpoints" / f"step-{step:06d}.ckpt", 10)


@pytest.mark.parametrize("ckpt_path", ["last", "auto"])
def test_the_newest_complete_one(folder, caplog, ckpt_path):
    assert resolve_checkpoint(ckpt_path, folder).endswith("step-000004.ckpt")
    assert caplog.messages == []
    cut_short(folder, 4)
    assert resolve_checkpoint(ckpt_path, folder).endswith("step-000002.ckpt")
    (line,) = caplog.messages
    assert "step-000004.ckpt is skipped" in line
    assert "10 bytes, 1000 were written" in line
    assert line.endswith("resuming from step-000002.ckpt")


def test_going_back_gives_up_what_is_later(folder, caplog):
    """Otherwise a restart would jump from the new branch to the old one's end."""
    invalidate_later_checkpoints(folder / "checkpoints" / "step-000004.ckpt", folder)
    assert resolve_checkpoint("last", folder).endswith("step-000004.ckpt")
    invalidate_later_checkpoints(folder / "checkpoints" / "step-000002.ckpt", folder)
    assert "step-000004.ckpt is of a later step than step-000002.ckpt" in caplog.text
    assert resolve_checkpoint("last", folder).endswith("step-000002.ckpt")


def test_one_rank_says_what_is_skipped(folder, caplog, monkeypatch):
    cut_short(folder, 4)
    monkeypatch.setenv("RANK", "1")
    assert resolve_checkpoint("last", folder).endswith("step-000002.ckpt")
    assert caplog.messages == []


def test_none_is_complete(folder, caplog):
    cut_short(folder, 2, 4)
    with pytest.raises(UserError, match="no complete checkpoint in"):
        resolve_checkpoint("last", folder)
    assert resolve_checkpoint("auto", folder) is None
    assert caplog.text.count("resuming from the start") == 2
    assert resolve_checkpoint(None, folder) is None


def test_auto_is_a_new_run_where_there_is_nothing(tmp_path, caplog):
    assert resolve_checkpoint("auto", tmp_path) is None
    assert caplog.messages == []
    with pytest.raises(UserError, match="name the run to resume by run_name=…, or start it without"):
        resolve_checkpoint("last", tmp_path)


def test_a_new_run_does_not_mix_its_checkpoints_with_another(folder):
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        resolve_checkpoint(None, folder)


def test_a_path_must_be_complete_if_anything_says_that_it_was(folder, tmp_path):
    path = str(folder / "checkpoints" / "step-000004.ckpt")
    assert resolve_checkpoint(path, tmp_path) == path
    cut_short(folder, 4)
    with pytest.raises(UserError, match="10 bytes, 1000 were written"):
        resolve_checkpoint(path, tmp_path)
