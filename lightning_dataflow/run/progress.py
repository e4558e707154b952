"""Progress of what takes long, in the log."""

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

INTERVAL_S = 10.0


def log_progress(verb: str) -> Callable[[int, int], None]:
    """A callback for (done, total) that logs every 10 s and at the end."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > INTERVAL_S:
            last = time.monotonic()
            log.info("%s %d/%d", verb, done, total)

    return report
