"""Features that `capture` wrote are trained on, by runs that they belong to."""

import json

import pytest

from lightning_dataflow.cli import capture, evaluate, train
from tests.unit.cli.conftest import one_line
from tests.unit.run.test_claim import start_owner

pytestmark = pytest.mark.integration


def test_capture_then_train_is_online_to_the_bit(run, tmp_path, capsys):
    assert run(train.main, "run_name=online") == 0
    assert run(capture.main, "store=shared_dir", "store.root=features") == 0
    printed = capsys.readouterr().out
    assert "88 samples in features" in printed
    assert "train on them: python train.py topology=offline store.root=features experiment=tiny" in printed
    assert run(train.main, "topology=offline", "store.root=features", "run_name=offline") == 0
    assert run(train.main, "topology=offline", "run_name=captures-itself") == 0
    online, *others = (
        json.loads((tmp_path / "runs" / name / "result.json").read_text())["losses"]
        for name in ("online", "offline", "captures-itself")
    )
    assert others == [online, online]
    assert run(capture.main, "store=shared_dir", "store.root=features") == 1
    assert run(capture.main, "store=shared_dir") == 1


def test_features_of_another_target_are_refused(run, tmp_path, capsys):
    from lightning_dataflow.targets.tiny import write_tiny_target

    assert run(capture.main, "store=shared_dir", "store.root=features") == 0
    other = write_tiny_target(tmp_path / "other", seed=1)
    assert run(train.main, "topology=offline", "store.root=features", f"target.path={other}") == 1
    assert "captured with another target weights" in one_line(capsys)
    assert run(train.main, "run_name=mine") == 0
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step-000002.ckpt"
    assert run(evaluate.main, f"evaluate.checkpoint='{checkpoint}'", f"target.path={other}") == 1
    assert "was trained for another target" in one_line(capsys)


def test_two_captures_do_not_mix_in_one_folder(run, tmp_path, capsys):
    owner = start_owner(tmp_path / "features")
    assert owner.stdout.readline() == "mine\n"
    assert run(capture.main, "store=shared_dir", "store.root=features") == 1
    assert f"error: features is in use by process {owner.pid} on " in (error := one_line(capsys))
    assert error.endswith("wait for it, or choose another store.root")
    owner.kill()
    owner.communicate()
    assert run(capture.main, "store=shared_dir", "store.root=features") == 0


def test_features_captured_for_another_strategy_are_refused(run, capsys):
    """Three layers for eagle3, five for dflash."""
    assert run(capture.main, "store=shared_dir", "store.root=features") == 0
    offline = ("topology=offline", "store.root=features")
    assert run(train.main, *offline, "strategy=dflash") == 1
    message = (
        "layers [1, 3, 4], this dflash draft reads [1, 2, 3, 4, 5]: capture again with strategy=dflash, or set 'strate"
    )
    assert message in one_line(capsys)
    assert run(train.main, *offline, "strategy=dflash", "strategy.layer_ids=[1, 3, 4]") == 0


def test_the_secret_of_a_store_is_in_no_file_of_the_run(run, tmp_path, capsys):
    (tmp_path / "secret").write_text("hunter2\n")
    settings = ("store=shared_dir", "store.root=features", "store.secret_file=secret")
    assert run(capture.main, *settings) == 0
    assert run(train.main, "topology=offline", *settings[1:]) == 0
    assert run(train.main, "topology=offline", "store.root=features", "run_name=without") == 1
    assert "the secret does not match" in one_line(capsys)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "secret":
            assert b"hunter2" not in path.read_bytes(), path


def test_held_out_prompts_must_not_be_among_the_captured_ones(run, capsys):
    captured = ("store=shared_dir", "store.root=features", "data.num_eval_samples=0")
    assert run(capture.main, *captured) == 0
    assert run(train.main, "topology=offline", "store.root=features", "callbacks=default") == 1
    assert "captured from other prompts" in one_line(capsys)


def test_capture_in_groups_is_online_in_groups(run, tmp_path):
    groups = "target.capture_batch_size=4"
    assert run(train.main, "run_name=online", groups) == 0
    assert run(train.main, "run_name=offline", "topology=offline", groups) == 0
    online, offline = (json.loads((tmp_path / "runs" / n / "result.json").read_text()) for n in ("online", "offline"))
    assert online["losses"] == offline["losses"]
