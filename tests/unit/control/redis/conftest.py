"""A Redis of one's own."""

import pytest

from lightning_dataflow.services.redis import LocalRedis


@pytest.fixture
def own(tmp_path):
    """Starts a Redis for this test, with settings."""
    made: list[LocalRedis] = []

    def start(*settings: str) -> LocalRedis:
        made.append(LocalRedis(tmp_path / f"redis-{len(made)}", settings=settings))
        return made[-1]

    yield start
    for one in made:
        one.close()
