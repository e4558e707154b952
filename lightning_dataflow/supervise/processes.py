"""A process of a run that is supervised."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from lightning_dataflow.run.exit_status import BAD_SETTINGS, TERMINATED
from lightning_dataflow.services.leash import leashed_command

POLL_S = 0.05
INTERRUPT_S, KILL_S = 7.0, 2.0


class Part:
    """A process of the run, in a process group of its own, that dies with this process.

    Its lines are printed with its name in front, except one that begins with `error: `, which is kept.

    Args:
        death_signal: what it gets when this process is gone. A producer can be killed, whatever it does. A trainer has
            ranks to end, and frees what it holds: SIGINT.
    """

    def __init__(self, name: str, arguments: Sequence[str], num_threads: int, death_signal: signal.Signals):
        self.name = name
        self._arguments = arguments
        self._num_threads = num_threads
        self._death_signal = death_signal
        self.start()

    def start(self, *more: str) -> None:
        """Start it; once it ended, again.

        Args:
            more: arguments that replace those of the same names.
        """
        self.error: str | None = None
        names = [one.partition("=")[0] for one in more]
        arguments = [*without(self._arguments, *names), *more]
        # Idle threads that spin keep the other parts from their cores.
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
        with interrupts_wait():
            self.process = subprocess.Popen(
                leashed_command([sys.executable, "-m", "lightning_dataflow", "train", *arguments], self._death_signal),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self.process.stdout is not None, "it was asked for"
        self._forward = threading.Thread(target=self._forward_lines, args=(self.process.stdout,), daemon=True)
        self._forward.start()

    def signal(self, number: signal.Signals) -> None:
        """Send `number` to the part and all processes it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def is_running(self) -> bool:
        """Whether any process of the part is there."""
        if self.process.poll() is None:
            return True
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def kill(self) -> None:
        """End what is left of it, the ranks that it started among them."""
        self.signal(signal.SIGKILL)
        deadline = time.monotonic() + KILL_S
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def how_it_ended(self) -> str:
        """Its error, or its status in words."""
        self.drain()
        status = self.process.returncode
        if self.error is not None:
            return self.error
        if status < 0:
            hint = " (which the system also sends when memory runs out)" if status == -signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-status).name}{hint}"
        if status == TERMINATED:
            return "was ended by SIGTERM"
        return f"ended with status {status}, see above"

    def may_do_better(self) -> bool:
        """Whether it failed of something else than its settings; those end with status 1 and one line."""
        self.drain()
        return self.process.returncode != BAD_SETTINGS or self.error is None

    def drain(self) -> None:
        """Wait for its last lines."""
        self._forward.join(KILL_S)

    def _forward_lines(self, pipe: IO[bytes]) -> None:
        line = b""
        while chunk := os.read(pipe.fileno(), 1 << 16):
            for piece in chunk.splitlines(keepends=True):
                line += piece
                if line.endswith((b"\n", b"\r")):
                    self._show(line.decode(errors="replace"))
                    line = b""
        if line:
            self._show(line.decode(errors="replace") + "\n")

    def _show(self, line: str) -> None:
        if line.startswith("error: "):
            self.error = line.removeprefix("error: ").strip()
        elif line.strip():
            sys.stdout.write(f"[{self.name}] {line}")
            sys.stdout.flush()


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM come when the block is done: a process that it starts is then known, and can be ended."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [(one, signal.signal(one, lambda number, frame: came.append(number))) for one in numbers]
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def end_all(parts: Sequence[Part]) -> None:
    """Interrupt what still runs, so that it can free what it holds; then kill it."""
    for number, patience_s in ((signal.SIGINT, INTERRUPT_S), (signal.SIGKILL, KILL_S)):
        running = [part for part in parts if part.is_running()]
        for part in running:
            part.signal(number)
        deadline = time.monotonic() + patience_s
        while any(part.is_running() for part in running) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    for part in parts:
        part.drain()


def without(arguments: Sequence[str], *names: str) -> list[str]:
    """`arguments` but those that set one of `names`."""
    return [one for one in arguments if one.lstrip("+").partition("=")[0] not in names]
