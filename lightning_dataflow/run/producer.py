"""`role=producer`: capture until the trainer has finished."""

import logging
import threading
import time
from collections.abc import Sequence

from lightning_dataflow.contracts import PeerFailedError
from lightning_dataflow.producers import RolloutWorker

log = logging.getLogger(__name__)

POLL_S = 0.1
END_S = 10.0
"""How long workers may take to give their leases back when the run is being ended."""


def produce(workers: Sequence[RolloutWorker]) -> None:
    """Announce the run, wait for its trainer, and capture what it needs."""
    feed, channel = workers[0].feed, workers[0].plane.log
    log.info("announced %d samples in %s, waiting for the trainer to begin", len(feed), channel.name)
    try:
        run_all(workers)
    except PeerFailedError as error:
        raise PeerFailedError(f"{error}; {_progress(workers)}") from error
    log.info("captured %d samples", sum(worker.num_captured for worker in workers))


def _progress(workers: Sequence[RolloutWorker]) -> str:
    """What is done and what is left, when no server is left to do it."""
    done = sum(worker.num_captured for worker in workers)
    plan = workers[0].plane.ledger.plan()
    total = "" if plan is None else f" of {plan.stop - plan.start}"
    return f"{done}{total} samples are captured: start servers and resume with ckpt_path=last"


def run_all(workers: Sequence[RolloutWorker]) -> None:
    """Run all workers, each in a thread where there are several; the first error ends all and is raised."""
    if len(workers) == 1:
        return workers[0].run()
    stopping, errors = threading.Event(), []

    def end() -> None:
        stopping.set()
        for worker in workers:
            worker.stop_waiting()

    def run(worker: RolloutWorker) -> None:
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
                thread.join(POLL_S)  # a join without a timeout would hold Ctrl-C back
    finally:
        end()
        _join(threads, workers)
    if errors:
        raise errors[0]


def _join(threads: Sequence[threading.Thread], workers: Sequence[RolloutWorker]) -> None:
    deadline = time.monotonic() + END_S
    for thread, worker in zip(threads, workers, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            log.warning("gave up on %s after %.0f s: it was %s", worker.name, END_S, worker.state)
