"""Ctrl-C and SIGTERM end a command, whatever they meet."""

import os
import signal
import sys
import time

import pytest

from lightning_dataflow.cli.hydra_command import command
from lightning_dataflow.run.signals import Terminated, on_sigterm, raise_again

pytestmark = pytest.mark.integration


def test_a_sigterm_after_ctrl_c_does_not_disturb_its_answer(run, monkeypatch):
    """The supervisor tells its parts by the one, and a scheduler all processes by the other."""
    answered = []

    def interrupted(config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            answered.append(True)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert run(command(interrupted)) == 130
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert answered == [True]


@pytest.fixture
def heeded(monkeypatch):
    """Signals, as a command heeds them."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: on_sigterm}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    monkeypatch.setattr(sys, "unraisablehook", raise_again)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interrupt_that_meets_a_finaliser_is_not_lost(heeded, number, kind, capfd):
    class Freed:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # the handler raises in here

    with pytest.raises(kind):
        Freed()
        for _ in range(100):  # one long sleep would not be interrupted
            time.sleep(0.1)
    assert capfd.readouterr().err == ""
