"""Start SGLang's server with an API key that no command line and no log shows: `python -m … FLAGS < key.txt`."""

import logging
import runpy
import sys
from typing import Any


def main() -> None:
    """Run `sglang.launch_server` in this process with the key on the first line of standard input; exit without one."""
    key = sys.stdin.readline().strip()
    if not key or not key.isascii() or not key.isprintable():  # a server without a key would answer everyone
        sys.exit("error: no API key on standard input: add `< key.txt`, a file that holds one line of printable ASCII")
    hide(key)
    sys.argv.append(f"--api-key={key}")  # the process list shows the original arguments
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def hide(secret: str) -> None:
    """Replace `secret` in everything that this process logs; SGLang logs its arguments."""
    make, forms = logging.getLogRecordFactory(), {secret, repr(secret)[1:-1]}

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # the message does not fit its arguments, which the handlers report
            return record
        for form in forms:
            if form in text:
                text = text.replace(form, "***")
                record.msg, record.args = text, ()
        return record

    logging.setLogRecordFactory(factory)


if __name__ == "__main__":
    main()
