"""Exit statuses of a command."""

INTERRUPTED, TERMINATED = 130, 143
"""Ended by Ctrl-C or SIGTERM, as shells give them."""
BAD_SETTINGS, RETRYABLE = 1, 75
"""Failed with one line. A process of a run (`role=`) tells whether it would fail in the same way again; if not, the
supervisor starts it again."""
