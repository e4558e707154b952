"""`train.py` in a process that exits slowly, so that a Ctrl-C can arrive during the exit handlers of torch and Mooncake."""

import atexit
import time

from lightning_dataflow.cli.train import main


def linger() -> None:
    print("exiting", flush=True)
    time.sleep(60)


atexit.register(linger)
main()
