"""Processes of a supervised run."""

import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from lightning_dataflow.contracts import waiting
from lightning_dataflow.supervise.processes import ManagedProcess, defer_interrupts, end_all, wait_for_end


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


def test_a_wait_for_processes_names_those_that_are_left(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.01)
    ended, left = (SimpleNamespace(name=name, is_running=lambda on=on: on) for name, on in (("a", False), ("b", True)))
    assert wait_for_end([ended, left], 0.2) == [left]
    assert "waiting for b to end, for 0 s so far" in caplog.text
    caplog.clear()
    assert wait_for_end([ended], 0.2) == []
    assert caplog.text == ""
