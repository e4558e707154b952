"""The file that a capture server is configured with."""

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.sglang_plugin.settings import read_settings
from lightning_dataflow.sglang_plugin.wire import SERVER_FILE
from lightning_dataflow.stores import SharedDirFeatureStore


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{{"store": "shared_dir", "root": "{0}", "secret": "s"}}'),
        ("a.toml", 'store = "shared_dir"\nroot = "{0}"\nsecret = "s"'),
    ],
)
def test_json_and_toml(tmp_path, monkeypatch, name, text):
    (tmp_path / name).write_text(text.format(tmp_path / "features"))
    monkeypatch.setenv(SERVER_FILE, str(tmp_path / name))
    stores = read_settings()
    assert stores.get("run").uri == SharedDirFeatureStore(tmp_path / "features", secret="s").uri
    assert stores.get("run") is stores.get("run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "neither JSON nor TOML"),
        ("[]", "no table"),
        ("{}", "names no address"),
        ('{"store": "shared_dir"}', "names no root"),
        ('{"store": "redis"}', "use mooncake or shared_dir"),
        ('{"address": "h:1", "adress": "h:2"}', r"unknown settings \['adress'\]"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, text, message):
    (tmp_path / "server.json").write_text(text)
    monkeypatch.setenv(SERVER_FILE, str(tmp_path / "server.json"))
    with pytest.raises(UserError, match=message):
        read_settings()


def test_no_file(tmp_path, monkeypatch):
    monkeypatch.delenv(SERVER_FILE, raising=False)
    with pytest.raises(UserError, match=SERVER_FILE):
        read_settings()
    monkeypatch.setenv(SERVER_FILE, str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="No such file"):
        read_settings()
