"""Ctrl-C and SIGTERM end a command in order: what it started is ended, and what it holds is freed."""

import _thread
import atexit
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
AGAIN_S = 0.01


class Terminated(KeyboardInterrupt):
    """SIGTERM, from a scheduler or whoever stops a container. What answers Ctrl-C answers this too."""


def on_sigterm(number: int, frame: object) -> NoReturn:
    """Raise Terminated, once: a scheduler may signal all processes of a run, and then their supervisor does too."""
    for each in NUMBERS:
        signal.signal(each, _do_nothing)
    raise Terminated


def on_sigint(number: int, frame: object) -> NoReturn:
    """Raise KeyboardInterrupt. A SIGTERM that follows asks for the same and is ignored; a second Ctrl-C is not."""
    signal.signal(signal.SIGTERM, _do_nothing)
    raise KeyboardInterrupt


def _do_nothing(number: int, frame: object) -> None:
    """With SIG_IGN, Python would print a warning for a signal already in flight."""


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM raise KeyboardInterrupt; after it they do what they did before."""
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    signal.signal(signal.SIGTERM, on_sigterm)
    if handlers[signal.SIGINT] is not signal.SIG_IGN:  # as a shell's background job has it
        signal.signal(signal.SIGINT, on_sigint)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        atexit.register(_end_at_once)


def _end_at_once() -> None:
    """While the interpreter exits there is nothing left to free, and a KeyboardInterrupt would show as a traceback."""
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def raise_again(dropped: "sys.UnraisableHookArgs") -> None:
    """The hook for unraisable exceptions: an interrupt raised in a `__del__`, where Python drops it, is raised again."""
    if not isinstance(dropped.exc_value, KeyboardInterrupt):
        return sys.__unraisablehook__(dropped)
    number = signal.SIGINT
    if isinstance(dropped.exc_value, Terminated):
        number = signal.SIGTERM
        signal.signal(number, on_sigterm)
    threading.Timer(AGAIN_S, _thread.interrupt_main, (number,)).start()
