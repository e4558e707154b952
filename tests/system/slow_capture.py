"""Imported by a command (`imports=[tests.system.slow_capture]`): its target says that it captures, and takes a minute."""

import time

from lightning_dataflow.targets import HFTargetEngine

capture = HFTargetEngine.capture


def linger(*arguments, **options):
    print("capturing", flush=True)
    time.sleep(60)
    return capture(*arguments, **options)


HFTargetEngine.capture = linger  # type: ignore[method-assign]
