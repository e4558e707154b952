"""The file that a capture server is configured with."""

import time

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.sglang_plugin import settings
from lightning_dataflow.sglang_plugin.settings import ServerStores, read_settings
from lightning_dataflow.sglang_plugin.wire import SERVER_FILE
from lightning_dataflow.stores import SharedDirFeatureStore, StoreUnavailableError
from tests.records import make_origin
from tests.streams import make_tensors


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
    with stores.use("run") as store, stores.use("run") as again:
        assert store.uri == SharedDirFeatureStore(tmp_path / "features", secret="s").uri
        assert store is again


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


def put(stores: ServerStores, seq: int):
    with stores.use("run") as store:
        return store.put(make_tensors(seq), make_origin(seq))


@pytest.mark.slow
def test_a_mooncake_that_comes_and_goes_is_connected_anew_and_stops_the_server_once(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "PATIENCE_S", 1.0)
    monkeypatch.setattr(settings, "REST_S", 2.0)
    with LocalMooncake(capacity_bytes=16 << 20, log_dir=tmp_path) as mooncake:
        stores = ServerStores({"address": mooncake.master_address})
        put(stores, 1)
    for longest_s in (10.0, 0.1, 0.1):
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="Mooncake master"):
            put(stores, 2)
        assert time.monotonic() - began < longest_s
    time.sleep(2.1)
    with pytest.raises(StoreUnavailableError, match="no Mooncake master listens at"):
        put(stores, 3)
    with mooncake:
        for server in mooncake.servers:
            server.start()
        time.sleep(2.1)
        assert put(stores, 4).uri == "mooncake://run"


def test_another_error_does_not_cut_the_store_off(tmp_path):
    stores = ServerStores({"store": "shared_dir", "root": str(tmp_path)})
    with pytest.raises(ValueError, match="without tensors"), stores.use("run") as store:
        store.put({}, make_origin(1))
    assert put(stores, 1)
