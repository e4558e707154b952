"""Small real parts of a stream: references, a feed whose features tell which sample they are, and a whole run."""

import multiprocessing
import secrets
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

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
from lightning_dataflow.data import FeatureCard, PassOrder, StreamingSource
from lightning_dataflow.producers import Feed, RolloutWorker
from lightning_dataflow.producers.capture import FEATURES
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.stores.base import Tensors, num_bytes

CAPTURE = CaptureSpec(layer_ids=(0,), norm="post", hidden_size=2)
CARD = FeatureCard(
    features=FEATURES,
    dtype="float32",
    prompts_version="0",
    capture=CAPTURE,
    target_model_version="m",
    tokenizer_version="t",
    max_num_tokens=4,
)
PLAN = RunPlan(start=0, stop=40, window=4)
ORDER = PassOrder(300, 0)
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
    """Of features that are in no store."""
    origin = make_origin(seq, attempt, **options)
    spec = FeatureSpec(name="x", shape=(origin.num_tokens, 2), dtype="float32")
    return SampleRef(
        origin=origin,
        uri="memory://0",
        generation=f"{attempt}-{secrets.token_hex(8)}",
        features={"x": spec},
        num_bytes=origin.num_tokens * 8,
    )


def make_tensors(seq: int) -> Tensors:
    n = 2 + seq % 3
    return {
        "input_ids": torch.full((n,), seq % 100),
        "loss_mask": torch.ones(n, dtype=torch.uint8),
        "aux_hidden_states": torch.full((n, 2), float(seq)),
        "last_hidden_state": torch.full((n, 2), float(seq)),
    }


class SeqFeed(Feed):
    """Sample seq is filled with the number seq.

    Args:
        before: called with (seqs, attempt) before each capture; may raise.
    """

    card = CARD
    seed = 0

    def __init__(self, before: Callable[[Sequence[int], int], None] = lambda seqs, attempt: None, *, length: int = 300):
        self.before = before
        self.length = length
        self.captured: list[tuple[tuple[int, ...], int]] = []

    def __len__(self) -> int:
        return self.length

    def sizes(self) -> list[int]:
        return [self.num_bytes(seq) for seq in range(self.length)]

    def num_bytes(self, seq: int) -> int:
        return num_bytes(make_tensors(seq))

    def capture(self, seqs: Sequence[int], attempt: int) -> list[tuple[SampleOrigin, Tensors]]:
        self.before(seqs, attempt)
        self.captured.append((tuple(seqs), attempt))
        return [(make_origin(seq, attempt), make_tensors(seq)) for seq in seqs]

    def token_counts(self) -> torch.Tensor:
        return torch.ones(8, dtype=torch.int64)


def memory_plane(folder: Path, run_id: str = "run") -> ControlPlane:
    return resolve_control_plane("dataflow_colocated", run_id, path=folder)


def log_of(ledger: MetadataStore) -> StreamingRefChannel:
    """A log that goes with a ledger under test."""
    if isinstance(ledger, RedisMetadataStore):
        return RedisChannel(ledger.server)
    return FileChannel(_scratch().name)


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def leased(answer: Lease | NoLease) -> Lease | None:
    return answer if isinstance(answer, Lease) else None


def begin(plane: ControlPlane, start: int = 0, stop: int = 100, window: int = 4) -> None:
    plane.ledger.begin(RunPlan(start=start, stop=stop, window=window), published={}, wanted={}, frontier=start)


def make_worker(plane: ControlPlane, store: FeatureStore, feed: Feed | None = None, **options: Any) -> RolloutWorker:
    settings: dict[str, Any] = {"name": "producer-0", "watermarks": WIDE} | options
    return RolloutWorker(settings.pop("name"), feed or SeqFeed(), plane, store, settings.pop("watermarks"), **settings)


def make_source(plane: ControlPlane, store: FeatureStore, **options: Any) -> StreamingSource:
    return StreamingSource(plane, store, **{"start_timeout_s": 1.0, "idle_timeout_s": 5.0} | options)


def forked(function: Callable[..., None], *arguments: Any) -> Any:
    """Run `function` in a process that starts at once because it need not import anything; it may not use torch."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process
