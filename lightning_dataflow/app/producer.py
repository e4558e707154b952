"""`role=producer`: capture until the trainer has finished."""

from typing import Any

from lightning_dataflow.app.schema import TrainConfig
from lightning_dataflow.app.watch import own_worker_name


def produce(config: TrainConfig, settings: dict[str, Any]) -> None:
    """Announce the run, wait for its trainer, and capture what it needs."""
    import torch

    from lightning_dataflow.app.build import Builder
    from lightning_dataflow.app.topologies import make_worker

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    worker = make_worker(Builder(config, settings), own_worker_name())
    print(f"announced {len(worker.feed)} samples in {worker.plane.log.name}, waiting for the trainer to begin", flush=True)
    try:
        worker.run()
    finally:
        worker.store.close()
        worker.plane.close()
    print(f"captured {worker.num_captured} samples", flush=True)
