"""Start a command that dies with its parent: `python -I -S leash.py PARENT_PID SIGNAL command...` (Linux).

Standard library only and no imports of this package, so that a child starts in milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def leashed_command(command: list[str], death_signal: signal.Signals) -> list[str]:
    """`command`, wrapped so that it gets `death_signal` when this process is gone, for whatever reason.

    The kernel watches the thread that starts the command: start it from one that lives as long as the command should.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(death_signal)), *command]


def main() -> None:
    """Ask the kernel for the signal, then become the command."""
    parent, death_signal, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):  # it died before the kernel was asked, so the signal would never come
        sys.exit(f"{command[0]} not started: the process that wanted it is gone")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # or it is ignored, if a shell started the run in the background
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
