"""Parts that come late."""

import time
from contextlib import ExitStack

import pytest

from lightning_dataflow.config.parsing import parse_config
from lightning_dataflow.contracts import UserError
from lightning_dataflow.control import RedisMetadataStore
from lightning_dataflow.control.heartbeat import producer_failures
from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.run.streams import control_plane, make_workers
from lightning_dataflow.stores import MemoryFeatureStore
from tests.records import begin
from tests.streams import SeqFeed
from tests.unit.config.test_config import make


@pytest.fixture
def config(redis_server, redis_run):
    where = (f"channel.address={redis_server.where.address}", f"channel.secret_file={redis_server.secret_file}")
    name = f"run_name={redis_run.run_id}"
    return parse_config(make("topology=disagg_online", "channel=redis", "control=redis", name, *where))


def test_a_producer_that_loads_while_the_run_completes_ends_and_leaves_nothing(config, redis_run):
    """Whoever left a completed run last removed it; a producer that came then waited half an hour for a trainer."""
    with ExitStack() as resources:
        (first,) = make_workers(
            "producer-1", config, control_plane(config), lambda: (SeqFeed(), MemoryFeatureStore()), resources
        )
        begin(first.plane)

        def load() -> tuple[SeqFeed, MemoryFeatureStore]:
            trainer = RedisMetadataStore(RedisServer(redis_run.where, redis_run.run_id))
            assert [part["state"] for part in trainer.status()["parts"]] == ["loaded", "loading"]
            trainer.finish("completed")
            first.plane.close()
            trainer.close()
            return SeqFeed(), MemoryFeatureStore()

        with ExitStack() as late:
            plane = control_plane(config)
            late.callback(plane.close)
            (second,) = make_workers("producer-2", config, plane, load, late)
            start = time.monotonic()
            second.run()
            assert time.monotonic() - start < 5
        assert redis_run.ask("EXISTS", *redis_run.keys) == 0


def test_a_producer_that_cannot_load_says_that_it_failed(tmp_path):
    """A trainer that waits for samples ends with this error, and does not wait out its time."""
    config = parse_config(make("topology=disagg_online", "store=shared_dir", f"channel.path={tmp_path}", "run_name=t"))
    plane = control_plane(config)

    def load() -> None:
        raise UserError("no such target")

    with pytest.raises(UserError, match="no such target"), ExitStack() as resources:
        make_workers("producer-0", config, plane, load, resources)
    (failure,) = producer_failures(plane.ledger)
    assert failure.endswith(": no such target")
