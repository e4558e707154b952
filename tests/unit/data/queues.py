"""Queues on a real log, and the producers that fill it."""

import threading
from collections.abc import Sequence

from lightning_dataflow.contracts import LogRecord, SampleRef
from lightning_dataflow.control import ControlPlane
from lightning_dataflow.data import StreamingRefQueue
from tests.records import WIDE, make_ref, memory_plane


def queue_of(plane: ControlPlane, **options) -> StreamingRefQueue:
    """A reader of its own."""
    reader = memory_plane(plane.log.name)
    return StreamingRefQueue(
        ControlPlane(run_id="run", ledger=plane.ledger, channel=reader.log),
        **{"idle_timeout_s": 5.0} | options,
    )


def publish(plane: ControlPlane, *seqs: int, attempt: int = 0):
    refs = {seq: make_ref(seq, attempt) for seq in seqs}
    kind = "supersede" if attempt else "ref"
    plane.log.publish([LogRecord(kind=kind, seq=seq, ref=ref) for seq, ref in refs.items()])
    return refs


def lease_and_publish(plane: ControlPlane, group: int = 4):
    lease = plane.ledger.lease("producer-0", group=group, num_bytes=lambda seq: 8, watermarks=WIDE, lease_s=60)
    refs = {seq: make_ref(seq, lease.attempt) for seq in lease.wanted}
    assert plane.publish(lease, refs) == list(refs)
    return refs


def soon(action, after_s: float = 0.05) -> None:
    timer = threading.Timer(after_s, action)
    timer.daemon = True
    timer.start()


def unwanted(records: Sequence[LogRecord]) -> list[SampleRef | None]:
    return [record.ref for record in records]
