"""A process of a supervised run."""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from lightning_dataflow.contracts.errors import BAD_SETTINGS, TERMINATED
from lightning_dataflow.contracts.waiting import wait_until
from lightning_dataflow.run.signals import NUMBERS
from lightning_dataflow.services.server import signal_group, start_process

POLL_S = 0.05
INTERRUPT_S, KILL_S = 7.0, 2.0


class ManagedProcess:
    """A `train` command in a process group of its own, which dies with this process.

    Its output is forwarded line by line, with its name in front. A line that begins with `error: ` is kept instead.

    Args:
        death_signal: what it gets when this process is gone. A producer can be killed at any time. A trainer has ranks to
            end and a store to clean up: SIGINT.
    """

    def __init__(self, name: str, arguments: Sequence[str], num_threads: int, death_signal: signal.Signals):
        self.name = name
        self._arguments = arguments
        self._death_signal = death_signal
        # With OpenMP's default, idle threads would spin and keep the other processes from their cores.
        self._environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.start()

    def start(self, *more: str) -> None:
        """Start it, or start it again after it ended, with `more` arguments."""
        self.error: str | None = None
        command = [sys.executable, "-m", "lightning_dataflow", "train", *self._arguments, *more]
        with defer_interrupts():
            self.process = start_process(
                command,
                self._death_signal,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
        assert self.process.stdout is not None, "a pipe"
        self._forwarder = threading.Thread(target=self._forward_output, args=(self.process.stdout,), daemon=True)
        self._forwarder.start()

    def is_running(self) -> bool:
        """Whether it, or any process that it started, is running."""
        return self.process.poll() is None or signal_group(self.process, 0)

    def kill(self) -> None:
        """Kill what is left of it, including ranks that it started."""
        signal_group(self.process, signal.SIGKILL)
        wait_for_end([self], KILL_S)
        self.drain()

    def exit_reason(self) -> str:
        """Its error message, or its exit status in words; complete once it is drained."""
        status = self.process.returncode
        if self.error is not None:
            return self.error
        if status < 0:
            hint = " (which the system also sends when memory runs out)" if status == -signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-status).name}{hint}"
        if status == TERMINATED:
            return "was ended by SIGTERM"
        return f"ended with status {status}, see above"

    def is_retryable(self) -> bool:
        """Whether another start could succeed: it did not fail because of its settings."""
        return self.process.returncode != BAD_SETTINGS or self.error is None

    def drain(self) -> None:
        """Wait until its last lines are forwarded."""
        self._forwarder.join(KILL_S)

    def _forward_output(self, pipe: IO[bytes]) -> None:
        for line in io.TextIOWrapper(pipe, encoding="utf-8", errors="replace", newline=""):
            if line.startswith("error: "):
                self.error = line.removeprefix("error: ").strip()
            elif line.strip():
                sys.stdout.write(f"[{self.name}] {line}" + ("" if line.endswith(("\n", "\r")) else "\n"))
                sys.stdout.flush()


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Handle SIGINT and SIGTERM only after the block: a process that it starts is then known, and can be ended."""
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def wait_for_end(processes: Sequence[ManagedProcess], timeout_s: float) -> list[ManagedProcess]:
    """Wait until all have ended; returns those that have not after `timeout_s`."""

    def running() -> list[ManagedProcess]:
        return [process for process in processes if process.is_running()]

    wait_until(lambda: not running(), timeout_s, POLL_S, lambda: f"{', '.join(each.name for each in running())} to end")
    return running()


def end_all(processes: Sequence[ManagedProcess]) -> None:
    """Interrupt all, so that each can free what it holds; then kill those that did not end."""
    running = list(processes)
    for number, timeout_s in ((signal.SIGINT, INTERRUPT_S), (signal.SIGKILL, KILL_S)):
        for process in running:
            signal_group(process.process, number)
        running = wait_for_end(running, timeout_s)
    for process in processes:
        process.drain()
