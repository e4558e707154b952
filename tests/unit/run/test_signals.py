"""A command handles signals while it runs, and leaves nothing behind."""

import signal
import subprocess
import sys
import textwrap

import pytest

from lightning_dataflow.run.signals import Terminated, on_sigint, on_sigterm, signals_interrupt
from tests.processes import ROOT, environment

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def ctrl_c_is_heeded():
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def state() -> list:
    return [*map(signal.getsignal, NUMBERS), sys.unraisablehook]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_handlers_are_what_they_were_before(number, kind):
    before = state()
    with signals_interrupt():
        assert state()[:2] == [on_sigint, on_sigterm]
    assert state() == before
    with pytest.raises(kind), signals_interrupt():
        signal.raise_signal(number)
    assert state() == before


def test_an_ignored_ctrl_c_stays_ignored():
    """As a shell's background job has it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.integration
def test_sigterm_ends_the_test_runner_while_a_command_runs(tmp_path):
    """The command under test took it for itself, failed its test, and the runner went on with the next."""
    (tmp_path / "conftest.py").write_text("from tests.unit.cli.conftest import *\n")
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent(
            """
            import sys, time
            from tests.unit.cli.conftest import status_of
            from lightning_dataflow.run.signals import signals_interrupt
            from lightning_dataflow.contracts.errors import TERMINATED

            def command():
                try:
                    with signals_interrupt():
                        print("running", flush=True)
                        time.sleep(60)
                except KeyboardInterrupt:
                    sys.exit(TERMINATED)

            def test_first():
                assert status_of(command) == 0

            def test_second():
                print("went on", flush=True)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", tmp_path],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("running" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "went on" not in shown
