"""Commands that run within the process of the tests."""

import signal
from collections.abc import Callable, Iterator

import pytest

from lightning_dataflow.contracts.errors import TERMINATED


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    """A command under test must leave Ctrl-C and SIGTERM to the test runner."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def status_of(main: Callable[[], None]) -> int:
    """The exit status of a command. A SIGTERM that it received was meant for the test runner, so that ends too."""
    try:
        main()
    except SystemExit as error:
        if error.code == TERMINATED:
            pytest.exit("terminated", returncode=TERMINATED)
        return int(error.code or 0)
    return 0
