"""Signs of life: a thread that tells the ledger what a part of the run does."""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from lightning_dataflow.contracts import PeerTimeoutError, UserError
from lightning_dataflow.control.base import MetadataStore

EVERY_S = 2.0
FRESH_S = 10.0
SUPERVISOR = "supervisor"


class Heartbeat:
    """Reports `name` as alive every two seconds until `stop`.

    Args:
        describe: what the part does or waits for now.
        renew_s: also extend the leases of `name` by this much; None where it holds none.
    """

    def __init__(self, ledger: MetadataStore, name: str, describe: Callable[[], str], *, renew_s: float | None = None):
        self._ledger = ledger
        self._name = name
        self._describe = describe
        self._renew_s = renew_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat of {name}", daemon=True)
        self._thread.start()

    def stop(self, last_words: str, *, failed: bool = False, fatal: bool = False) -> None:
        """End the thread and leave a last state; see MetadataStore.report."""
        self._stop.set()
        self._thread.join()
        with suppress(PeerTimeoutError):
            self._ledger.report(self._name, last_words, failed=failed, fatal=fatal)

    def _run(self) -> None:
        while True:
            with suppress(PeerTimeoutError):  # the ledger is blocked: the part itself will say so, if it needs it
                self._ledger.report(self._name, self._describe())
                if self._renew_s is not None:
                    self._ledger.renew(self._name, self._renew_s)
            if self._stop.wait(EVERY_S):
                return


def why_over(ledger: MetadataStore) -> list[str]:
    """Why no producer captures for this run any more; [] while one does, or none has said that it failed.

    An error in the settings is one that every producer meets, so the first ends the run. After any other, the run goes on
    while a producer lives, or a supervisor, which starts producers again or ends the run itself. One that died without a
    word may be started again by whoever started it: only the reader's patience ends that wait.
    """
    if not ledger.failures():
        return []
    parts = ledger.status()["parts"]
    failed = [f"{part['name']}: {part['state']}" for part in parts if part["failed"]]
    if any(part["fatal"] for part in parts):
        return failed
    others = [part for part in parts if not part["failed"] and part["name"].startswith(("producer", SUPERVISOR))]
    if any(_is_running(part["pid"]) for part in others):
        return []
    return failed + [f"{part['name']}: its process {part['pid']} is gone" for part in others]


def check_no_other_trainer(ledger: MetadataStore, run_id: str) -> None:
    """Raise UserError while another process trains this run: two would take each other's samples.

    One that died is no other trainer, however lately it was seen.
    """
    status = ledger.status()
    for part in status.get("parts", []):
        alive = part["seen_s_ago"] < FRESH_S and part["host"] == socket.gethostname() and part["pid"] != os.getpid()
        if part["name"] == "trainer-0" and not status["finished"] and alive and _is_running(part["pid"]):
            raise UserError(
                f"process {part['pid']} trains run {run_id} ({part['state']}): end it first, or choose another run_name"
            )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
