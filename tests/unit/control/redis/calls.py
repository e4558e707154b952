"""Calls of a log and a ledger in a Redis, as tests make them."""

from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.control import RedisMetadataStore, RunPlan
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.services.redis import LocalRedis
from tests.records import WIDE, make_ref


def kill(server: LocalRedis) -> None:
    server.process.kill()
    server.process.wait()


def channel(server: LocalRedis, **options: float) -> RedisChannel:
    return RedisChannel(RedisServer(server.where, "run", **options))


def refs(*seqs: int) -> list[LogRecord]:
    return [LogRecord(kind="ref", seq=seq, ref=make_ref(seq)) for seq in seqs]


def seqs(log: RedisChannel) -> list[int]:
    return [record.seq for record in log.poll()]


def begun(server: RedisServer) -> RedisMetadataStore:
    ledger = RedisMetadataStore(server)
    ledger.begin(RunPlan(start=0, stop=100, window=4), {}, frontier=0)
    return ledger


def lease(ledger: RedisMetadataStore):
    return ledger.lease("a", group=4, num_bytes=lambda seq: 10, watermarks=WIDE, lease_s=60.0)
