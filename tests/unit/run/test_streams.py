"""Parts that come late."""

import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from lightning_dataflow.control import RedisMetadataStore
from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.run import streams as topologies
from lightning_dataflow.stores import MemoryFeatureStore
from tests.records import begin
from tests.streams import SeqFeed
from tests.unit.config.test_config import make, typed


@pytest.fixture
def config(redis_server, redis_run):
    where = (f"channel.address={redis_server.where.address}", f"channel.secret_file={redis_server.secret_file}")
    return typed(make("topology=disagg_online", "channel=redis", "control=redis", f"run_name={redis_run.run_id}", *where))


def make_parts(config) -> SimpleNamespace:
    """What producers need of a Builder."""
    plane, resources = topologies.control_plane(config), ExitStack()
    resources.callback(plane.close)
    return SimpleNamespace(config=config, resources=resources, plane=plane, shared_store=MemoryFeatureStore())


def test_a_producer_that_loads_while_the_run_completes_ends_and_leaves_nothing(config, redis_run, monkeypatch):
    """Whoever left a completed run last removed it; a producer that came then waited half an hour for a trainer."""
    parts = make_parts(config)
    monkeypatch.setattr(topologies, "make_feed", lambda parts: SeqFeed())
    with parts.resources:
        (first,) = topologies.make_workers(parts, "producer-1")
        begin(first.plane)

        def load(parts: object) -> SeqFeed:
            trainer = RedisMetadataStore(RedisServer(redis_run.where, redis_run.run_id))
            assert [part["state"] for part in trainer.status()["parts"]] == ["loaded", "loading"]
            trainer.finish("completed")
            first.plane.close()
            trainer.close()
            return SeqFeed()

        monkeypatch.setattr(topologies, "make_feed", load)
        late = make_parts(config)
        with late.resources:
            (second,) = topologies.make_workers(late, "producer-2")
            start = time.monotonic()
            second.run()
            assert time.monotonic() - start < 5
        assert redis_run.ask("EXISTS", *redis_run.keys) == 0
