"""For `imports=[tests.system.slow_capture]`: capture takes a minute, and announces its start."""

import time

from lightning_dataflow.targets import HFTargetEngine

capture = HFTargetEngine.capture


def linger(*arguments, **options):
    print("capturing", flush=True)
    time.sleep(60)
    return capture(*arguments, **options)


HFTargetEngine.capture = linger  # type: ignore[method-assign]
