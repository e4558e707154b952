"""Processes of a supervised run."""

import os
import signal
import subprocess
import time

import pytest

from lightning_dataflow.supervise.processes import Part, end_all, interrupts_wait


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_part_that_is_interrupted_while_it_starts_is_known(monkeypatch, number):
    """Else it would go on for a moment after the command has ended."""
    popen = subprocess.Popen

    def late(*arguments, **options):
        process = popen(*arguments, **options)
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # the signal is heeded in here
        return process

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    monkeypatch.setattr(subprocess, "Popen", late)
    before = signal.signal(number, interrupt)
    parts: list[Part] = []
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_wait():
            parts.append(Part("trainer", ["role=trainer"], 1, signal.SIGINT))
        assert signal.getsignal(number) is interrupt
        (part,) = parts
        assert part.is_running()
    finally:
        signal.signal(number, before)
        end_all(parts)
    assert not parts[0].is_running()
