"""Commands that run within the process of the tests."""

import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from hydra.core.global_hydra import GlobalHydra

from lightning_dataflow.contracts.errors import TERMINATED

TINY = ("experiment=tiny", "callbacks=no_evaluation", "logger=none", "trainer.max_steps=2")


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    """A command under test must leave Ctrl-C and SIGTERM to the test runner."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def status_of(main: Callable[[], None]) -> int:
    """The exit status of a command. A SIGTERM that it received was meant for the test runner, so that ends too."""
    try:
        main()
    except SystemExit as error:
        if error.code == TERMINATED:
            pytest.exit("terminated", returncode=TERMINATED)
        return int(error.code or 0)
    return 0


@pytest.fixture
def run(tmp_path, monkeypatch, target_path, conversations):
    """run(command, *overrides) → exit status, in an empty folder, on the session's tiny target."""
    monkeypatch.chdir(tmp_path)
    parts = (f"target.path={target_path}", f"data.path={conversations}")

    def call(main, *overrides: str) -> int:
        GlobalHydra.instance().clear()
        chosen = {override.split("=")[0] for override in overrides}
        defaults = [one for one in (*TINY, *parts, "run_name=test") if one.split("=")[0] not in chosen]
        flags = [override for override in overrides if override.startswith("--")]
        settings = [override for override in overrides if not override.startswith("--")]
        monkeypatch.setattr(sys, "argv", ["lightning-dataflow", *flags, *defaults, *settings])
        return status_of(main)

    return call


def one_line(capsys: pytest.CaptureFixture) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
