"""`role=producer`: capture until the trainer has finished."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import PeerFailedError

if TYPE_CHECKING:
    from lightning_dataflow.producers import RolloutWorker

POLL_S = 0.1
END_S = 10.0
"""For workers to give their leases back when the run is being ended."""


def produce(config: TrainConfig, settings: dict[str, Any]) -> None:
    """Announce the run, wait for its trainer, and capture what it needs."""
    import torch

    from lightning_dataflow.run.builder import Builder
    from lightning_dataflow.run.streams import make_workers

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    parts = Builder(config, settings)
    with parts.resources:
        workers = make_workers(parts, f"producer-{socket.gethostname()}-{os.getpid()}")
        feed, log = workers[0].feed, workers[0].plane.log
        print(f"announced {len(feed)} samples in {log.name}, waiting for the trainer to begin", flush=True)
        try:
            run_all(workers)
        except PeerFailedError as error:
            raise PeerFailedError(f"{error}; {_progress(workers)}") from error
    print(f"captured {sum(worker.num_captured for worker in workers)} samples", flush=True)


def _progress(workers: "Sequence[RolloutWorker]") -> str:
    """What is done and what is left, when nobody is left to do it."""
    done = sum(worker.num_captured for worker in workers)
    plan = workers[0].plane.ledger.plan()
    wanted = "" if plan is None else f" of {plan.stop - plan.start}"
    return f"{done}{wanted} samples are captured: start servers and resume with ckpt_path=last"


def run_all(workers: "Sequence[RolloutWorker]") -> None:
    """Run all workers, each in a thread where there are several; the first error ends all and is raised."""
    if len(workers) == 1:
        return workers[0].run()
    stopping, errors = threading.Event(), []

    def end() -> None:
        stopping.set()
        for worker in workers:
            worker.stop_waiting()

    def run(worker: "RolloutWorker") -> None:
        try:
            worker.run(stopping.is_set)
        except BaseException as error:  # the main thread raises it
            errors.append(error)
            end()

    threads = [threading.Thread(target=run, args=(worker,), name=worker.name, daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not stopping.is_set():
                thread.join(POLL_S)  # not for ever: Ctrl-C must find us
    finally:
        end()
        deadline = time.monotonic() + END_S
        for thread, worker in zip(threads, workers, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                print(f"gave up on {worker.name} after {END_S:.0f} s: it was {worker.state}", flush=True)
    if errors:
        raise errors[0]
