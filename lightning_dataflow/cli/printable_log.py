"""Log messages may quote what other processes and files say."""

import logging

from lightning_dataflow.contracts.foreign import printable


class PrintableFormatter(logging.Formatter):
    """As another formatter, with escapes for what a terminal would act on."""

    def __init__(self, inner: logging.Formatter):
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return printable(self._inner.format(record))


def log_printable() -> None:
    """Make all handlers that Hydra has set up escape what they write."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, PrintableFormatter):
            handler.setFormatter(PrintableFormatter(handler.formatter or logging.Formatter()))
