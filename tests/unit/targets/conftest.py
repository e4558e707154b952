"""A store, two capture servers that fail on demand, and their client."""

from collections.abc import Iterator
from typing import Any

import pytest

from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.targets import SGLangServerTarget, sglang_pool, sglang_server
from tests.conftest import LAYER_IDS
from tests.unit.targets.capture_servers import ONE_AT_A_TIME, Server


@pytest.fixture
def store() -> MemoryFeatureStore:
    return MemoryFeatureStore()


@pytest.fixture
def servers(target, store) -> Iterator[list[Server]]:
    running = [Server(target, store), Server(target, store)]
    yield running
    for server in running:
        server.closed = True
    with ONE_AT_A_TIME:
        pass  # a thread that is inside of torch when the interpreter ends takes the process down
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(servers, store, target_path, monkeypatch):
    monkeypatch.setattr(sglang_pool, "PROBE_PAUSE_S", 0.1)
    monkeypatch.setattr(sglang_server, "PROBE_TIMEOUT_S", 1.0)

    def make(**options: Any) -> SGLangServerTarget:
        defaults = {"urls": [server.url for server in servers], "store_id": "run", "layer_ids": LAYER_IDS}
        return SGLangServerTarget(target_path, **{**defaults, "store": store, "absence_s": 0.3, **options})

    return make
