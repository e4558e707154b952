from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_dataflow.control import MetadataStore, RedisMetadataStore, SqliteMetadataStore
from lightning_dataflow.control.redis.server import RedisServer


@pytest.fixture(params=["sqlite", "redis"])
def open_ledger(request, tmp_path: Path) -> Iterator[Callable[[], MetadataStore]]:
    """Opens one ledger any number of times, as other processes would."""
    server = request.getfixturevalue("redis_run") if request.param == "redis" else None
    made: list[MetadataStore] = []

    def opened() -> MetadataStore:
        made.append(
            SqliteMetadataStore(tmp_path / "ledger.sqlite")
            if server is None
            else RedisMetadataStore(RedisServer(server.where, server.run_id))
        )
        return made[-1]

    yield opened
    for one in made:
        one.close()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def ledger(request, tmp_path: Path):
    if request.param == "redis":
        made = RedisMetadataStore(request.getfixturevalue("redis_run"))
    else:
        made = SqliteMetadataStore(tmp_path / "ledger.sqlite" if request.param == "sqlite" else None)
    yield made
    made.close()
