"""A run on the memory of this process: its log and ledger, and its store."""

import pytest

from lightning_dataflow.stores import MemoryFeatureStore
from tests.records import memory_plane


@pytest.fixture
def plane(tmp_path):
    return memory_plane(tmp_path)


@pytest.fixture
def store():
    return MemoryFeatureStore()
