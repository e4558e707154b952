"""The commands in this process, from beginning to end: what they write and print."""

import json
import sys
from pathlib import Path

import pytest

from lightning_dataflow.cli import evaluate, main as commands, show_mask, train
from tests.unit.cli.conftest import one_line

pytestmark = pytest.mark.integration


def test_train_then_resume_then_evaluate(run, tmp_path, capsys):
    assert run(train.main, "callbacks.checkpoint.every_n_train_steps=1") == 0
    folder = tmp_path / "runs" / "test"
    first = json.loads((folder / "result.json").read_text())
    assert first["status"] == "completed"
    assert (folder / "figure.png").stat().st_size > 1000
    assert run(train.main, "trainer.max_steps=4", "ckpt_path=last") == 0
    second = json.loads((folder / "result.json").read_text())
    assert second["losses"][:2] == first["losses"]
    assert second["samples_trained"] == 32
    checkpoint = folder / "checkpoints" / "step-000004.ckpt"
    options = (f"evaluate.checkpoint='{checkpoint}'", "evaluate.output=report.json")
    assert run(evaluate.main, *options) == 0
    (report,) = json.loads(Path("report.json").read_text())["measurements"]
    assert report["num_identical"] == report["num_prompts"] == 8
    assert "acceptance_length" in capsys.readouterr().out
    assert run(train.main, "trainer.max_steps=4", "ckpt_path=last") == 1
    assert "leaves nothing to train: raise it" in one_line(capsys)
    # A run that was killed behind its last checkpoint.
    path = Path("runs/test/result.json")
    whole = json.loads(path.read_text())
    path.unlink()
    assert run(train.main, "trainer.max_steps=4", "ckpt_path=auto") == 0
    ended = json.loads(path.read_text())
    for name in ("status", "losses", "optimizer_steps", "samples_trained", "samples_skipped"):
        assert ended[name] == whole[name], name
    assert run(train.main, "trainer.max_steps=5", "run_name=other", f"ckpt_path='{checkpoint}'") == 1
    assert "the checkpoint belongs to the run test, this is other" in one_line(capsys)
    assert run(evaluate.main, "evaluate.checkpoint=null", "run_name=unused") == 1
    assert run(evaluate.main, *options, "run_name=unused") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["other", "test"]  # a measurement leaves no folder
    assert run(train.main) == 1  # would mix its checkpoints with these
    assert "resume it with ckpt_path=last, or choose another run_name" in capsys.readouterr().err


def test_passes_set_the_number_of_steps(run, tmp_path, capsys):
    assert run(train.main, "trainer.max_steps=null", "data.num_passes=2", "data.num_samples=16") == 0
    result = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())
    assert result["optimizer_steps"] == 4
    assert "are not trained on" not in capsys.readouterr().out
    settings = ("trainer.max_steps=null", "data.num_passes=1", "data.num_samples=19", "run_name=uneven")
    assert run(train.main, *settings) == 0
    assert "3 samples at the end of 1 passes over 19 fill no step" in capsys.readouterr().out


@pytest.mark.parametrize("topology", ["online", "interleaved", "offline"])
def test_listed_samples_are_not_trained(run, tmp_path, capsys, topology):
    (tmp_path / "listed").write_text("".join(f"{index:08d}\n" for index in range(0, 96, 2)))
    assert run(train.main, f"topology={topology}", "data.skip_ids=listed") == 0
    result = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())
    assert 0 < result["samples_trained"] < 16
    assert result["samples_trained"] + result["samples_skipped"] == 16
    assert "listed in skip_ids" in capsys.readouterr().out


def test_fast_dev_run_leaves_nothing(run, tmp_path):
    assert run(train.main, "+trainer.fast_dev_run=1") == 0
    assert not (tmp_path / "runs" / "test" / "checkpoints").exists()


def test_a_resumed_run_keeps_its_first_metrics(run, tmp_path):
    settings = ("logger=csv", "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_train_steps=1")
    assert run(train.main, *settings) == 0
    assert run(train.main, *settings, "trainer.max_steps=3", "ckpt_path=last") == 0
    rows = [len(path.read_text().splitlines()) for path in (tmp_path / "runs" / "test").rglob("metrics.csv")]
    assert sorted(rows) == [2, 3]


def test_a_choice_from_a_folder_of_the_users(run, tmp_path):
    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    (tmp_path / "mine" / "optimizer" / "slow.yaml").write_text("defaults: [schema, _self_]\nweight_decay: 0.3\n")
    assert run(train.main, "--config-dir=mine", "optimizer=slow") == 0
    result = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())
    assert result["settings"]["optimizer"]["weight_decay"] == 0.3


def test_show_mask(run, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"instruction": "q", "output": answer}) + "\n" for answer in "abc") + "{broken")
    settings = ("data.prepare=null", f"data.path={prompts}", "data.num_eval_samples=1", "data.template_args={message: 1}")
    chosen = ("show_mask.start=1", "show_mask.count=3", "show_mask.colour=false", "show_mask.output=rows.json")
    assert run(show_mask.main, *settings, *chosen, "data.max_broken=1") == 0
    shown = capsys.readouterr().out
    assert [shown.count(f"⟦{answer}<|im_end|>⟧") for answer in "abc"] == [0, 1, 1]
    assert f"{prompts}, line 4: left out: not JSON" in shown
    assert "2 samples of 2 records to train on, 1 held out; left out: 1 broken" in shown
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["turn"], len(row["spans"])) for row in rows] == [(1, 1), (1, 1), (None, 0)]


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 0), (["fly"], 1)])
def test_the_command_list(monkeypatch, capsys, arguments, status):
    monkeypatch.setattr(sys, "argv", ["lightning-dataflow", *arguments])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == status
    assert "show-mask" in capsys.readouterr().out


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_automatic_precision(run, tmp_path, monkeypatch, native, precision):
    from lightning_dataflow.run import trainer as lightning_trainer

    monkeypatch.setattr(lightning_trainer, "multiplies_bfloat16", lambda device: native)
    assert run(train.main, "trainer.precision=auto") == 0
    result = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())
    assert result["precision"] == precision


def test_progress_where_there_is_no_terminal(run, tmp_path, capsys):
    """A line for each logged step, with the total; a bar would show nothing in a file before the end."""
    assert run(train.main, "trainer.log_every_n_steps=1") == 0
    steps = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())["optimizer_steps"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    told = [line.partition(":")[0] for line in lines if "train/loss" in line and "tokens/s" in line]
    assert told == [f"step {step}/{steps}" for step in range(1, steps + 1)]
    assert run(train.main, "run_name=silent", "+trainer.enable_progress_bar=false") == 0
    assert f"step {steps}/{steps}: " not in capsys.readouterr().out
