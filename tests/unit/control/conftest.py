from pathlib import Path

import pytest

from lightning_dataflow.control import SqliteMetadataStore


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request, tmp_path: Path):
    made = SqliteMetadataStore(tmp_path / "ledger.sqlite" if request.param == "sqlite" else None)
    yield made
    made.close()
