"""What others wrote does not reach a terminal as it is."""

import io
import logging

from lightning_dataflow.cli.printable_log import log_printable


def test_logs_are_printable(monkeypatch):
    root, output = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    monkeypatch.setattr(root, "handlers", [handler])
    log_printable()
    log_printable()
    root.error("skip: \x1b]0;owned\x07 %s", "\x9b2J")
    assert output.getvalue() == "[ERROR] skip: \\x1b]0;owned\\x07 \\x9b2J\n"
