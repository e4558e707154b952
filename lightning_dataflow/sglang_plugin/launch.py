"""Start SGLang's server with an API key that no command line and no log shows: `python -m … FLAGS < key.txt`."""

import logging
import runpy
import sys
from typing import Any


def main() -> None:
    """`sglang.launch_server` in this process; the key is the first line of standard input. Exits where there is none."""
    key = sys.stdin.readline().strip()
    if not key or not key.isascii() or not key.isprintable():  # a server without a key answers everybody
        sys.exit("error: no API key on standard input: add `< key.txt`, a file that holds one line of printable ASCII")
    hide(key)
    sys.argv.append(f"--api-key={key}")  # this process's own copy: others see what it was started with
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def hide(secret: str) -> None:
    """From all that this process logs; SGLang logs its arguments."""
    make, shown = logging.getLogRecordFactory(), {secret, repr(secret)[1:-1]}

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # a message that does not fit its arguments: the handlers' to report
            return record
        for one in shown:
            if one in text:
                text = text.replace(one, "***")
                record.msg, record.args = text, ()
        return record

    logging.setLogRecordFactory(factory)


if __name__ == "__main__":
    main()
