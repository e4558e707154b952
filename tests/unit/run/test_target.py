"""Settings of targets that SGLang captures for."""

from types import SimpleNamespace

import pytest

from lightning_dataflow.cli.hydra_command import typed
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.streams import make_source
from lightning_dataflow.run.target import read_api_key
from tests.unit.config.test_config import make


def test_an_engine_is_not_shared_by_ranks():
    config = typed(make("topology=online", "target.engine=sglang", "trainer=ddp", "trainer.devices=2"))
    with pytest.raises(UserError, match=r"shares a machine with one trainer process, not 2: set trainer\.devices=1"):
        make_source(SimpleNamespace(config=config))


@pytest.mark.integration
@pytest.mark.parametrize("content", ["", " \n", "two\nlines", "schlüssel"])
def test_a_file_without_a_key(tmp_path, content):
    (tmp_path / "key").write_text(content)
    config = typed(make(f"target.api_key_file={tmp_path}/key"))
    with pytest.raises(UserError, match="holds no key: it must be one line"):
        read_api_key(config.target)
    (tmp_path / "key").write_text(" the'key\n")
    assert read_api_key(config.target) == "the'key"
