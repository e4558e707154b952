"""Waiting for other processes, with an end."""

import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

SAY_AFTER_S = 10.0
LONGEST_CALL_S = 5.0
"""Between two looks; a longer gap means that this process itself was suspended."""


class Wait:
    """How long somebody has been waited for. After 10 s a warning says whom, and again after 30, 90, 270, … s.

    Time in which this process itself stood still (suspended, in a debugger) is not counted: the others could not answer.

    Args:
        who: whom or what for: what follows "waiting for".
        longest_call_s: between two calls of `seconds`; of a longer time only so much counts.
    """

    def __init__(self, who: str | Callable[[], str], longest_call_s: float = LONGEST_CALL_S):
        self._who = who
        self._longest_call_s = longest_call_s
        self.restart()

    def restart(self) -> None:
        """There is news: count from now on."""
        self._last, self._waited, self._say_at = time.monotonic(), 0.0, SAY_AFTER_S

    def seconds(self) -> float:
        """So far. Ask every few seconds."""
        now = time.monotonic()
        self._waited += min(now - self._last, self._longest_call_s)
        self._last = now
        if self._waited >= self._say_at:
            while self._waited >= self._say_at:  # one call may have been longer than several of these times
                self._say_at *= 3
            who = self._who if isinstance(self._who, str) else self._who()
            log.warning("waiting for %s, for %.0f s so far", who, self._waited)
        return self._waited


def wait_until(done: Callable[[], bool], timeout_s: float, pause_s: float, who: str | Callable[[], str]) -> bool:
    """Ask again and again whether it is `done`; False if it is not after `timeout_s`. See Wait for `who`."""
    wait = Wait(who)
    while not done():
        if wait.seconds() > timeout_s:
            return False
        time.sleep(pause_s)
    return True


@contextmanager
def said_if_long(who: str) -> Iterator[None]:
    """For a single call that blocks: after 10 s a warning says whom it waits for. See Wait for `who`."""
    message = "waiting for %s, for %.0f s so far"
    timer = threading.Timer(SAY_AFTER_S, log.warning, (message, who, SAY_AFTER_S))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def try_lock(file: int) -> bool:
    """Take the flock of an open file; False while another process has it. The kernel frees it however its owner ends.

    Raises:
        OSError: with a number of NO_LOCKS, the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
