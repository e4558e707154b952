"""Which checkpoints are complete, whatever a kill left behind."""

import os

import pytest

from lightning_dataflow.checkpoints.markers import incomplete, latest_checkpoint, make_room, mark_complete


def write(folder, step, *, sharded=False, mark=True):
    path = folder / f"step-{step:06d}.ckpt"
    if sharded:
        path.mkdir(parents=True)
        for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"):
            (path / name).write_bytes(os.urandom(100_000))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(100_000))
    if mark:
        mark_complete(path, step)
    return path


def cut_short(path):
    os.truncate(path, 60_000)


def other_content(path):
    path.write_bytes(os.urandom(100_000))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_short, "has 60000 bytes, 100000 were written"),
        (other_content, "is not what was written"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(tmp_path, sharded, damage, reason):
    old, new = (write(tmp_path, step, sharded=sharded) for step in (2, 4))
    assert latest_checkpoint(tmp_path) == new
    damage(new / "__1_0.distcp" if sharded else new)
    told = []
    assert latest_checkpoint(tmp_path, on_skip=told.append) == old
    if new.exists():
        assert len(told) == 1
        assert told[0].startswith(f"{new} is skipped")
        assert reason in told[0]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_without_a_marker_is_not_complete(tmp_path, sharded):
    old, new = write(tmp_path, 2), write(tmp_path, 4, sharded=sharded, mark=False)
    told = []
    assert latest_checkpoint(tmp_path, on_skip=told.append) == old
    assert "no completion marker" in told[0]
    (tmp_path / f"{new.name}.complete").write_text('{"global')
    assert "marker is damaged" in str(incomplete(new))
    os.truncate(tmp_path / f"{new.name}.complete", 1 << 40)  # it is not read whole
    assert "marker is damaged" in str(incomplete(new))


def test_the_newest_is_that_of_the_highest_step_whatever_its_name(tmp_path):
    write(tmp_path, 100)
    path = tmp_path / "best.ckpt"
    path.write_bytes(b"x")
    mark_complete(path, 1000)
    (tmp_path / "last.ckpt").symlink_to("step-000100.ckpt")
    assert latest_checkpoint(tmp_path) == path
    path.unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000100.ckpt"
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("sharded", [False, True])
def test_writing_over_a_checkpoint_voids_it_first(tmp_path, sharded):
    old, new = (write(tmp_path, step, sharded=sharded) for step in (2, 4))
    (tmp_path / ".step-000002.ckpt.part").write_text("half")
    make_room(new)
    assert latest_checkpoint(tmp_path, on_skip=lambda line: None) == old
    assert not sharded or not new.exists()  # shards of another number of ranks do not stay
    assert not list(tmp_path.glob(".*"))


def test_only_what_lightning_wrote_is_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    make_room(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes").read_text() == "keep"
