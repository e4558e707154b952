"""A Redis that a run starts for itself."""

import shutil

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.services.redis import LocalRedis

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)


@pytest.mark.integration
def test_a_failed_start_leaves_the_folder_free(tmp_path):
    with pytest.raises(UserError, match=r"redis-server .*redis\.log"):
        LocalRedis(tmp_path, settings=("no-such-setting yes",))
    with LocalRedis(tmp_path) as server:
        assert server.where.address


@pytest.mark.integration
def test_without_the_program_the_folder_stays_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.which", lambda name: None)
        with pytest.raises(UserError, match="redis-server is not installed"):
            LocalRedis(tmp_path)
    with LocalRedis(tmp_path):
        pass
