"""`train.py` in a process that takes its time to exit: what torch and Mooncake do then can meet a Ctrl-C."""

import atexit
import time

from lightning_dataflow.cli.train import main


def linger() -> None:
    print("exiting", flush=True)
    time.sleep(60)


atexit.register(linger)
main()
