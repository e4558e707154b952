"""Commands that run within the process of the tests."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def ctrl_c_stays() -> Iterator[None]:
    """A command that is over leaves SIGINT to the system: the process is about to end, which here it is not."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
