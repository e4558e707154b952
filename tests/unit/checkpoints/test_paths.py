"""What a run may remove, and what it takes over of a checkpoint's list of checkpoints."""

import os

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dataflow.checkpoints.files import CheckpointFiles
from lightning_dataflow.checkpoints.markers import make_room, mark_complete
from lightning_dataflow.checkpoints.paths import forget_foreign_paths, local_path


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A run's checkpoints, one of them sharded, beside folders that are none of its business. Returns run and files."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run" / "checkpoints"
    for folder in (run, run / "nested", tmp_path / "victim.ckpt", tmp_path / "victim"):
        folder.mkdir(parents=True)
        (folder / "step-1.ckpt").write_text("weights")
        (folder / "notes.txt").write_text("keep")
    for folder in (run / "sharded.ckpt", run / "own-folder.ckpt", tmp_path / "victim.ckpt"):
        folder.mkdir(exist_ok=True)
        (folder / ("notes.txt" if folder.stem == "own-folder" else "meta.pt")).write_text("shards")
    (tmp_path / "step-1.ckpt").write_text("weights")
    (run / "away").symlink_to(tmp_path / "victim")
    (run / "linked.ckpt").symlink_to(tmp_path / "victim.ckpt")
    files = CheckpointFiles()
    files.admit(run)
    return run, files


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "path",
    [
        "{root}/victim",
        "{root}/victim.ckpt",
        "{root}/step-1.ckpt",
        "victim.ckpt",
        "local://victim.ckpt",
        "local://{root}/victim.ckpt",
        "file://{root}/victim.ckpt",
        "{run}",
        "{run}/",
        "{run}/..",
        "{run}/notes.txt",
        "{run}/nested",
        "{run}/nested/step-1.ckpt",
        "{run}/own-folder.ckpt",
        "{run}/../../victim.ckpt",
        "local://{run}/../../step-1.ckpt",
        "{run}/away/step-1.ckpt",
        "{run}/away/../step-1.ckpt",
        "{run}/linked.ckpt/step-1.ckpt",
        "dir::file://{run}/step-1.ckpt",
        "memory://{run}/step-1.ckpt",
    ],
)
def test_what_is_no_checkpoint_of_the_run_stays(folders, tmp_path, path):
    run, files = folders
    before = everything(tmp_path)
    with pytest.warns(UserWarning, match="is not removed: it is no checkpoint") as warnings:
        files.remove_checkpoint(path.format(run=run, root=tmp_path))
    assert len(warnings) == 1 and "\n" not in str(warnings[0].message)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("path", ["{run}/step-1.ckpt", "run/checkpoints/step-1.ckpt", "local://{run}/step-1.ckpt"])
def test_a_file_of_the_run_is_removed_with_its_marker(folders, tmp_path, path):
    run, files = folders
    mark_complete(run / "step-1.ckpt", 1)
    files.remove_checkpoint(path.format(run=run))
    assert not list(run.glob("step-1.ckpt*"))
    (run / "step-1.ckpt.complete").touch()  # of a file that somebody else has removed
    files.remove_checkpoint(path.format(run=run))
    assert not list(run.glob("step-1.ckpt*"))


def test_a_sharded_folder_of_the_run_is_removed_and_of_a_symlink_the_link(folders, tmp_path):
    run, files = folders
    files.remove_checkpoint(run / "sharded.ckpt")
    files.remove_checkpoint(run / "linked.ckpt")
    assert not os.path.lexists(run / "sharded.ckpt") and not os.path.lexists(run / "linked.ckpt")
    assert (tmp_path / "victim.ckpt" / "meta.pt").exists()


def test_a_run_whose_folder_is_reached_through_a_symlink_removes_its_own(folders, tmp_path):
    run, files = folders
    (tmp_path / "scratch").symlink_to(run)
    files.remove_checkpoint(tmp_path / "scratch" / "step-1.ckpt")
    assert not (run / "step-1.ckpt").exists()


def test_a_checkpoint_elsewhere_is_removed_directly_in_its_folder_alone():
    """fsspec would expand wildcards."""
    import fsspec

    elsewhere, files = fsspec.filesystem("memory"), CheckpointFiles()
    for name in ("a.ckpt", "b.ckpt", "deep/a.ckpt"):
        elsewhere.pipe(f"/run/checkpoints/{name}", b"weights")
    files.admit("memory://run/checkpoints/")
    files.remove_checkpoint("memory://run/checkpoints/a.ckpt")
    for path in ("*.ckpt", "deep/a.ckpt", "../checkpoints/b.ckpt", "deep"):
        with pytest.warns(UserWarning, match="is not removed"):
            files.remove_checkpoint(f"memory://run/checkpoints/{path}")
    assert elsewhere.find("/run") == ["/run/checkpoints/b.ckpt", "/run/checkpoints/deep/a.ckpt"]


def test_writing_over_a_symlink_replaces_the_link(folders, tmp_path):
    run, _ = folders
    make_room(run / "linked.ckpt")
    assert not os.path.lexists(run / "linked.ckpt")
    assert (tmp_path / "victim.ckpt" / "meta.pt").exists()


def test_local_paths_are_seen_through_their_protocols():
    assert [str(local_path(path)) for path in ("a/b", "/a", "file:///a", "local://a/b")] == ["a/b", "/a", "/a", "a/b"]
    assert [local_path(path) for path in ("s3://a/b", "dir::file:///a")] == [None, None]


NAMES = ("best_k_models", "kth_best_model_path", "last_model_path", "best_model_path")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "foreign",
    ["local://victim.ckpt", "{run}/../../victim", "{run}/nested/step-1.ckpt", "{run}/notes.txt", "/old/a.ckpt", 1],
)
def test_a_list_of_checkpoints_that_names_another_is_left_out(folders, name, foreign):
    run, _ = folders
    callback = ModelCheckpoint(run, monitor="step", save_top_k=2)
    path = foreign.format(run=run) if isinstance(foreign, str) else foreign
    own = callback.state_dict() | {"best_k_models": {f"{run}/step-1.ckpt": 1}, "best_model_path": f"{run}/step-1.ckpt"}
    states = {callback.state_key: own, "EarlyStopping": {"patience": 3}}
    forget_foreign_paths([callback], states)
    assert states[callback.state_key] is own
    own[name] = {path: 1} if name == "best_k_models" else path
    with pytest.warns(UserWarning, match="the list is left out") as warnings:
        forget_foreign_paths([callback], states)
    assert repr(path) in str(warnings[0].message)
    assert states == {"EarlyStopping": {"patience": 3}}
