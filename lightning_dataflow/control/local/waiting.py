"""Waiting for other processes that use a file at the moment."""

import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

from lightning_dataflow.contracts import PeerTimeoutError
from lightning_dataflow.contracts.waiting import Wait

TIMEOUT_S = 30.0
PAUSE_S = 0.0001
"""A write takes about as long."""
Result = TypeVar("Result")


def wait_for_others(act: Callable[[], Result], purpose: str) -> Result:
    """Do `act`, again and again while a lock or a database belongs to another process.

    Raises:
        PeerTimeoutError: it did for TIMEOUT_S.
    """
    wait = Wait(f"another process of the run, to {purpose}")
    while True:
        try:
            return act()
        except (BlockingIOError, sqlite3.OperationalError) as error:
            if isinstance(error, sqlite3.OperationalError) and "locked" not in str(error):
                raise
            if wait.seconds() > TIMEOUT_S:
                raise PeerTimeoutError(
                    f"could not {purpose} within {TIMEOUT_S:.0f} s ({error}): is a process of the run stopped inside a "
                    "write? Continue or end it"
                ) from error
        time.sleep(PAUSE_S)
