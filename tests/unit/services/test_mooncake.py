"""A Mooncake that a run starts for itself."""

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.stores.mooncake.admin import MooncakeAdmin


def test_too_little_memory(tmp_path):
    with pytest.raises(UserError, match="is 1048576, Mooncake needs at least 16777216"):
        LocalMooncake(capacity_bytes=1 << 20, log_dir=tmp_path)


def test_a_server_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dataflow.services.mooncake.find_program", lambda name: "/bin/false")
    with pytest.raises(UserError, match=r"mooncake_master ended with status 1, see .*mooncake_master\.log: empty$"):
        LocalMooncake(capacity_bytes=16 << 20, log_dir=tmp_path)


def test_without_the_programs(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(UserError, match="mooncake_master is not installed: pip install"):
        LocalMooncake(capacity_bytes=16 << 20, log_dir=tmp_path)


@pytest.mark.integration
def test_its_life(tmp_path):
    with LocalMooncake(capacity_bytes=16 << 20, log_dir=tmp_path, warm=True) as mooncake:
        assert [server.poll() for server in mooncake.servers] == [None, None]
        assert MooncakeAdmin(mooncake.metrics_address).list_keys() == [], "warming leaves nothing"
        mooncake.storage.process.kill()
        mooncake.storage.process.wait()
    mooncake.close()
    assert mooncake.master.poll() is not None
    assert {path.name for path in tmp_path.iterdir()} == {"mooncake_master.log", "mooncake_client.log"}
