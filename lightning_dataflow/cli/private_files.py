"""Who may read what a command writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

PRIVATE = 0o077
_of_user: list[int] = []


@contextmanager
def private_files() -> Iterator[None]:
    """Make files and folders readable by their owner only: 0600 and 0700. Processes that the block starts do so too."""
    _of_user.append(os.umask(PRIVATE))
    try:
        yield
    finally:
        os.umask(_of_user.pop())


def share_files(shared: bool) -> None:
    """Inside of `private_files`: go back to the umask of the user, if that is wanted."""
    if shared and _of_user:
        os.umask(_of_user[-1])
