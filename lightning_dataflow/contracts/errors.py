"""Errors whose message is all the user needs: commands print it as one line.

Exit statuses: BAD_SETTINGS where the same command would fail again, RETRYABLE where it may succeed later, so that the
supervisor starts the process again; INTERRUPTED and TERMINATED after SIGINT and SIGTERM, as shells have them.
"""

import errno

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of file systems without locks."""

BAD_SETTINGS, RETRYABLE, INTERRUPTED, TERMINATED = 1, 75, 130, 143


class UserError(ValueError):
    """Bad input. The message names the value, the rule and the remedy."""


class UnknownNameError(UserError, KeyError):
    """A name that is not registered; the message lists the names that are."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message in quotes


class CapacityError(RuntimeError):
    """A store has no room. Nothing of the refused sample is visible; retry once samples were released."""


class CaptureMismatchError(UserError):
    """A target returned other features than the run was announced with; the message names the difference."""


class BrokenFeaturesError(ValueError):
    """Features of a sample hold NaN or infinity, so it is skipped. The message says where: the first such feature, and of
    several layers the first such layer."""


class NotFiniteError(UserError):
    """NaN or infinity where training needs numbers. It ends the run, and no checkpoint is written from then on; the message
    names where."""


class PeerTimeoutError(TimeoutError):
    """Nothing came from another process for too long. The message names who was waited for, for what, and how long."""


class PeerGoneError(ConnectionError):
    """Another process is not answering, perhaps temporarily. The request was fine and can be retried. The message names the
    process."""


class PeerFailedError(RuntimeError):
    """Another process of the run ended with an error, which the message repeats."""


TAKEN_OVER = "{} took over this run because this process had gone silent, and continues it from a checkpoint"
"""What a trainer's PeerFailedError says that was replaced."""
