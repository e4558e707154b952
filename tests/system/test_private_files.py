"""Who may read what a run leaves."""

import os
import stat

import pytest

from tests.processes import TINY, TRAIN, nightly, python, slow

SMALL = "store.capacity_bytes=64000000"
SHORT = ("trainer.max_steps=2", "run_name=mine", "data.num_samples=16")


def open_to_others(folder) -> dict[str, str]:
    """Files and folders below that others than their owner may use, with their modes."""
    modes = {path.relative_to(folder): path.lstat().st_mode for path in folder.rglob("*") if not path.is_symlink()}
    assert len(modes) > 5
    return {str(path): stat.filemode(mode) for path, mode in modes.items() if mode & 0o077}


@pytest.mark.parametrize(
    "settings",
    [
        ("topology=online", "logger=csv"),
        nightly(("topology=offline",)),
        nightly(("topology=disagg_online", "channel=redis", "control=redis", SMALL)),
        slow(("topology=disagg_offline", "store=shared_dir")),
    ],
    ids=lambda settings: settings[0].partition("=")[2],
)
def test_only_the_owner_may_read_a_run(tmp_path, settings):
    old = os.umask(0o022)
    try:
        python(TRAIN, *TINY, *settings, *SHORT, f"data.cache={tmp_path}/cache", cwd=tmp_path)
    finally:
        os.umask(old)
    assert open_to_others(tmp_path) == {}
    assert (tmp_path / "runs" / "mine").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "runs" / "mine" / "result.json").stat().st_mode & 0o777 == 0o600


def test_shared_files_are_made_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        python(TRAIN, *TINY, *SHORT, "shared_files=true", f"data.cache={tmp_path}/cache", cwd=tmp_path)
    finally:
        os.umask(old)
    run = tmp_path / "runs" / "mine"
    assert run.stat().st_mode & 0o777 == 0o750
    for name in ("result.json", "checkpoints/step-000002.ckpt", ".hydra/config.yaml"):
        assert (run / name).stat().st_mode & 0o777 == 0o640
