"""Records of a run and its control plane, without a tensor: tests that use no more than these import no torch."""

import multiprocessing
import secrets
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import CaptureSpec, FeatureSpec, SampleOrigin, SampleRef
from lightning_dataflow.control import (
    ControlPlane,
    Lease,
    MetadataStore,
    NoLease,
    RedisMetadataStore,
    RunPlan,
    Watermarks,
    resolve_control_plane,
)
from lightning_dataflow.control.local.log import FileChannel
from lightning_dataflow.control.log import StreamingRefChannel
from lightning_dataflow.control.redis.log import RedisChannel

CAPTURE = CaptureSpec(layer_ids=(0,), norm="post", hidden_size=2)
PLAN = RunPlan(start=0, stop=40, window=4)
WIDE = Watermarks(high_bytes=1 << 40, high_refs=1 << 40, low_bytes=1 << 39, low_refs=1 << 39)


def make_origin(seq: int, attempt: int = 0, *, run_id: str = "run", **options: Any) -> SampleOrigin:
    fields = {"num_tokens": 2 + seq % 3} | options
    return SampleOrigin(
        sample_id=f"{run_id}:s{seq}",
        run_id=run_id,
        source_task_id=f"s{seq}",
        source_id=f"s{seq}",
        capture=CAPTURE,
        target_model_version="m",
        tokenizer_version="t",
        attempt=attempt,
        **fields,
    )


def make_ref(seq: int, attempt: int = 0, **options: Any) -> SampleRef:
    """A reference to features that no store holds."""
    origin = make_origin(seq, attempt, **options)
    spec = FeatureSpec(name="x", shape=(origin.num_tokens, 2), dtype="float32")
    return SampleRef(
        origin=origin,
        uri="memory://0",
        generation=f"{attempt}-{secrets.token_hex(8)}",
        features={"x": spec},
        num_bytes=origin.num_tokens * 8,
    )


def rank_slice(window: int, size: int, rank: int, world_size: int) -> range:
    """The seqs that `rank` trains of a window of `size` seqs."""
    share = size // world_size
    start = window * size + rank * share
    return range(start, start + share)


def memory_plane(folder: Path, run_id: str = "run") -> ControlPlane:
    return resolve_control_plane("dataflow_colocated", run_id, path=folder)


def log_of(ledger: MetadataStore) -> StreamingRefChannel:
    """A log on the same backend as the ledger under test."""
    if isinstance(ledger, RedisMetadataStore):
        return RedisChannel(ledger.server)
    return FileChannel(_scratch().name)


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def leased(answer: Lease | NoLease) -> Lease | None:
    return answer if isinstance(answer, Lease) else None


def failures(ledger: MetadataStore) -> list[str]:
    """What failed processes reported since the latest `begin`."""
    return [f"{part['name']}: {part['state']}" for part in ledger.parts() if part["failed"]]


def begin(plane: ControlPlane, start: int = 0, stop: int = 100, window: int = 4) -> None:
    plane.ledger.begin(RunPlan(start=start, stop=stop, window=window), {}, frontier=start)


def forked(function: Callable[..., None], *arguments: Any) -> Any:
    """Run `function` in a forked process, which starts without importing anything; it must not use torch."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process
