"""Small real parts of a stream: a feed whose features tell which sample they are, a worker and a source."""

from collections.abc import Callable, Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lightning_dataflow.control import ControlPlane
from lightning_dataflow.data import DataFlowDataModule, FeatureCard, PassOrder, StreamingSource
from lightning_dataflow.producers import RolloutWorker
from lightning_dataflow.producers.capture import FROM_PROMPT
from lightning_dataflow.producers.feeds import CapturedSample, Feed, to_put
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.stores.base import Tensors
from lightning_dataflow.targets.base import HIDDEN_STATES
from tests.records import CAPTURE, WIDE, make_origin

CARD = FeatureCard(
    features=(*FROM_PROMPT, *HIDDEN_STATES),
    dtype="float32",
    prompts_version="0",
    capture=CAPTURE,
    target_model_version="m",
    tokenizer_version="t",
    max_num_tokens=4,
)
ORDER = PassOrder(300, 0)


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
        super().__init__()
        self.before = before
        self.sizes = [self.num_bytes(seq) for seq in range(length)]
        self.captured: list[tuple[tuple[int, ...], int]] = []

    def num_bytes(self, seq: int) -> int:
        return sum(tensor.nbytes for tensor in make_tensors(seq).values())

    def capture(self, seqs: Sequence[int], attempt: int, wanted: Collection[int]) -> Iterator[CapturedSample]:
        self.before(seqs, attempt)
        self.captured.append((tuple(seqs), attempt))
        return (to_put(seq, make_origin(seq, attempt), make_tensors(seq)) for seq in wanted)

    def token_counts(self) -> torch.Tensor:
        return torch.ones(8, dtype=torch.int64)


def make_worker(plane: ControlPlane, store: FeatureStore, feed: Feed | None = None, **options: Any) -> RolloutWorker:
    settings: dict[str, Any] = {"name": "producer-0", "watermarks": WIDE} | options
    return RolloutWorker(settings.pop("name"), feed or SeqFeed(), plane, store, settings.pop("watermarks"), **settings)


def make_source(plane: ControlPlane, store: FeatureStore, **options: Any) -> StreamingSource:
    source = StreamingSource(plane, store, **{"start_timeout_s": 1.0, "idle_timeout_s": 5.0} | options)
    source.order = ORDER
    return source


def read_batches(data: DataFlowDataModule, count: int, collate: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """The first micro-batches, without a Trainer; what else was read is freed."""
    place = {"global_rank": 0, "world_size": 1, "global_step": 0, "max_steps": 1000}
    strategy, module = SimpleNamespace(root_device=torch.device("cpu")), SimpleNamespace(collate=collate)
    data.trainer = SimpleNamespace(**place, strategy=strategy, lightning_module=module)
    stream = iter(data.train_dataloader())
    batches = [next(stream) for _ in range(count)]
    data.close("ended")
    return batches
