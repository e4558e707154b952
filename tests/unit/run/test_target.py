"""Settings of targets that SGLang captures for."""

import pytest

from lightning_dataflow.config.files import read_api_key
from lightning_dataflow.config.parsing import parse_config
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.target import check_one_engine
from tests.unit.config.test_config import make


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
