"""The target of a run: which features it captures, the check of its head, and settings of SGLang's servers."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from lightning_dataflow.config.files import read_api_key
from lightning_dataflow.config.parsing import parse_config
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run import builder, target as run_target
from lightning_dataflow.run.target import check_one_engine, served_target
from lightning_dataflow.targets.base import HIDDEN_STATES
from tests.unit.config.test_config import make


@pytest.mark.integration
@pytest.mark.parametrize(
    ("strategy", "features"),
    [
        (("strategy=eagle3", "strategy.draft_vocab_size=null"), HIDDEN_STATES),
        (("strategy=dflash",), HIDDEN_STATES[:1]),
    ],
)
def test_a_target_captures_what_the_strategy_reads_and_its_head_is_checked(monkeypatch, target_path, strategy, features):
    checked = []
    monkeypatch.setattr(builder, "check_head", checked.append)
    config = parse_config(make(*strategy, "target=hf", f"target.path={target_path}"))
    target = builder.Builder(config).target
    assert checked == [target]
    assert target.features == features


def test_the_head_of_a_served_target_is_checked(monkeypatch):
    checked = []
    monkeypatch.setattr(run_target, "check_served_head", checked.append)
    monkeypatch.setattr(
        run_target, "SGLangServerTarget", lambda path, **options: SimpleNamespace(stop_waiting=lambda: None, **options)
    )
    config = parse_config(make("topology=disagg_online", "target.engine=sglang_server", "target.urls=[http://127.0.0.1:9]"))
    with ExitStack() as resources:
        target = served_target(config, object(), "run", resources, layer_ids=(1, 3), features=HIDDEN_STATES[:1])
    assert checked == [target]
    assert (target.urls, target.features) == (["http://127.0.0.1:9"], HIDDEN_STATES[:1])


def test_an_engine_is_not_shared_by_ranks():
    config = parse_config(make("topology=online", "target.engine=sglang", "trainer=ddp", "trainer.devices=2"))
    with pytest.raises(UserError, match=r"shares a machine with one trainer process, not 2: set trainer\.devices=1"):
        check_one_engine(config)


@pytest.mark.integration
@pytest.mark.parametrize("content", ["", " \n", "two\nlines", "schlüssel"])
def test_a_file_without_a_key(tmp_path, content):
    (tmp_path / "key").write_text(content)
    config = parse_config(make(f"target.api_key_file={tmp_path}/key"))
    with pytest.raises(UserError, match="holds no key: it must be one line"):
        read_api_key(config.target)
    (tmp_path / "key").write_text(" the'key\n")
    assert read_api_key(config.target) == "the'key"
