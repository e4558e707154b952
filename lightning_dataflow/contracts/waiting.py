"""Waiting for other processes, with an end."""

import fcntl
import time
from collections.abc import Callable


def wait_until(done: Callable[[], bool], timeout_s: float, pause_s: float) -> bool:
    """Ask again and again whether it is `done`; False if it is not after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


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
