from pathlib import Path

import pytest

from lightning_dataflow.control import RedisMetadataStore, SqliteMetadataStore


@pytest.fixture(params=["memory", "sqlite", "redis"])
def ledger(request, tmp_path: Path):
    if request.param == "redis":
        made = RedisMetadataStore(request.getfixturevalue("redis_run"))
    else:
        made = SqliteMetadataStore(tmp_path / "ledger.sqlite" if request.param == "sqlite" else None)
    yield made
    made.close()
