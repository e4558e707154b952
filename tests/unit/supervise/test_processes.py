"""Processes of a supervised run."""

import os
import signal
import subprocess
import time

import pytest

from lightning_dataflow.supervise.processes import ManagedProcess, defer_interrupts, end_all


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_interrupted_while_it_starts_is_known(monkeypatch, number):
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
    processes: list[ManagedProcess] = []
    try:
        with pytest.raises(KeyboardInterrupt), defer_interrupts():
            processes.append(ManagedProcess("trainer", ["role=trainer"], 1, signal.SIGINT))
        assert signal.getsignal(number) is interrupt
        (process,) = processes
        assert process.is_running()
    finally:
        signal.signal(number, before)
        end_all(processes)
    assert not processes[0].is_running()
