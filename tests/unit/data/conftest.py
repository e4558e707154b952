"""A run that has begun, whose queues look at their peers at once."""

import pytest

from lightning_dataflow.control import ControlPlane
from lightning_dataflow.data import queue as queue_module
from tests.records import begin, memory_plane


@pytest.fixture
def plane(tmp_path, monkeypatch) -> ControlPlane:
    monkeypatch.setattr(queue_module, "CHECK_PEERS_S", 0.0)
    made = memory_plane(tmp_path)
    made.log.announce({"run_id": "run"})
    begin(made)
    return made
