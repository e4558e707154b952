"""`--config-dir` adds strategies with settings for targets and experiments."""

import sys

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from lightning_dataflow.cli.hydra_command import command

SHOW = ("strategy=outside", "experiment=tiny", "--cfg", "job", "-p", "optimizer.lr")


def shown(config):
    """A command; `--cfg job` shows its settings instead."""


@pytest.fixture
def show(tmp_path, monkeypatch):
    """Show the learning rate of a strategy in the folder `own`, whose YAML has these entries."""

    def call(entries: str, *arguments: str) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "own" / "strategy").mkdir(parents=True)
        (tmp_path / "own" / "strategy" / "outside.yaml").write_text(f"name: outside\nwith:\n  {entries}\n")
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *SHOW])
        command(shown)()

    yield call
    ConfigStore.instance().repo["with_experiment"].pop("outside-tiny.yaml", None)


@pytest.mark.parametrize("flags", [["--config-dir=own"], ["--config-dir", "own"], ["-cd", "own"]], ids=" ".join)
def test_a_strategy_in_a_config_dir_has_settings_for_an_experiment(show, capsys, flags):
    show("experiment=tiny: {optimizer: {lr: 7}}", *flags)
    assert capsys.readouterr().out == "7.0\n"


def test_an_entry_for_another_group_is_one_line(show, capsys):
    with pytest.raises(SystemExit) as end:
        show("data=tiny: {optimizer: {lr: 7}}", "--config-dir=own")
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "error: own/strategy/outside.yaml: with: data=tiny: an entry is target=NAME or experiment=NAME\n"
    )
