"""Signs of life: a thread that tells the ledger what a part of the run does."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.control.ledger import SILENT_S, MetadataStore
from lightning_dataflow.control.processes import is_running, pid_space

log = logging.getLogger(__name__)

EVERY_S = 2.0
FRESH_S = 10.0
CLOSE_S = 0.5
RETRY_S = 0.2
SUPERVISOR = "supervisor"
TRAINER = "trainer-0"
CLAIM_TRIES = 10
NO_ANSWER = (PeerTimeoutError, PeerFailedError)


class Heartbeat:
    """Reports `name` as alive every two seconds until `stop`.

    No error ends it, since the leases of a part that works would expire. Each kind is logged once.

    Args:
        describe: what the part does or waits for now.
        renew_s: also extend the leases of `name` by this much; None where it holds none.
    """

    def __init__(self, ledger: MetadataStore, name: str, describe: Callable[[], str], *, renew_s: float | None = None):
        self._ledger = ledger
        self._name = name
        self._describe = describe
        self._renew_s = renew_s
        self._logged: set[type[Exception]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat of {name}", daemon=True)
        self._thread.start()

    def stop(self, last_words: str, *, failed: bool = False, fatal: bool = False) -> None:
        """End the thread and leave a last state; see MetadataStore.report."""
        self._stop.set()
        self._thread.join()
        try:
            _try_twice(partial(self._ledger.report, self._name, last_words, failed=failed, fatal=fatal))
        except Exception as error:  # it must not hide the error that ended the part
            log.warning("%s could not leave its last words (%r): %s", self._name, error, last_words)

    def _run(self) -> None:
        while True:
            if self._survive(self._report) and self._renew_s is not None:
                self._survive(partial(self._ledger.renew, self._name, self._renew_s))
            if self._stop.wait(EVERY_S):
                return

    def _report(self) -> None:
        self._ledger.report(self._name, self._describe())

    def _survive(self, act: Callable[[], None]) -> bool:
        """False when the ledger does not answer. The part itself reports that if it needs the ledger."""
        try:
            act()
        except Exception as error:
            if isinstance(error, NO_ANSWER):
                return False
            if type(error) not in self._logged:
                self._logged.add(type(error))
                log.warning("%s could not give a sign of life (%r); it goes on and tries again", self._name, error)
        return True


def _try_twice(act: Callable[[], None]) -> None:
    try:
        act()
    except NO_ANSWER:  # that has waited long enough already
        raise
    except Exception:
        time.sleep(RETRY_S)
        act()


def end_leases(ledger: MetadataStore, pid: int) -> None:
    """All leases of that process of this machine end at once, whatever its workers are called: it is known to be dead."""
    for part in ledger.parts():
        if (part["pids"], part["pid"]) == (pid_space(), pid):
            ledger.renew(part["name"], 0)


def producer_failures(ledger: MetadataStore) -> list[str]:
    """Why no producer captures for this run any more; [] while one does, or none has said that it failed.

    An error in the settings is one that every producer meets, so the first ends the run. After any other, the run goes on
    while a producer lives, or a supervisor, which starts producers again or ends the run itself. One that died without a
    word may be started again by whoever started it: only the reader's patience ends that wait.
    """
    parts = ledger.parts()
    failed = [f"{part['name']}: {part['state']}" for part in parts if part["failed"]]
    if not failed or any(part["fatal"] for part in parts):
        return failed
    others = [part for part in parts if not part["failed"] and part["name"].startswith(("producer", SUPERVISOR))]
    if any(_is_alive(part) for part in others):
        return []
    return failed + [f"{part['name']}: its process {part['pid']} on {part['host']} is gone" for part in others]


def check_no_other_trainer(ledger: MetadataStore, run_id: str) -> None:
    """Raise UserError while another process trains this run: two would take each other's samples.

    One that died is no other trainer, however lately it was seen: of one on this machine that is known, one elsewhere is
    given FRESH_S for its next sign of life.
    """
    first, began = _trainer(ledger), time.monotonic()
    while (part := _trainer(ledger)) is not None and first is not None:
        if part["pids"] == pid_space():
            there = part["pid"] != os.getpid() and part["seen_s_ago"] < FRESH_S and is_running(part["pid"])
        else:
            there = part["seen_s_ago"] + CLOSE_S < first["seen_s_ago"] + time.monotonic() - began
            if not there and part["seen_s_ago"] < FRESH_S:
                time.sleep(CLOSE_S)
                continue
        if there:
            raise UserError(
                f"process {part['pid']} on {part['host']} trains run {run_id} ({part['state']}): end it first, or choose "
                "another run_name"
            )
        return


def claim_trainer(ledger: MetadataStore, run_id: str) -> None:
    """Be the one process that trains this run. Of several at the same moment one is, the others are refused.

    Raises:
        UserError: see check_no_other_trainer.
    """
    for _ in range(CLAIM_TRIES):
        last = _last_trainer(ledger.status())
        check_no_other_trainer(ledger, run_id)
        if ledger.claim(TRAINER, "beginning", None if last is None else (last["host"], last["pid"])):
            return
    raise UserError(f"trainers of run {run_id} begin and end again and again: start one alone, or choose another run_name")


def _trainer(ledger: MetadataStore) -> Mapping[str, Any] | None:
    status = ledger.status()
    return None if status.get("finished") else _last_trainer(status)


def _last_trainer(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((part for part in status.get("parts", []) if part["name"] == TRAINER), None)


def _is_alive(part: Mapping[str, Any]) -> bool:
    """A process elsewhere is alive until it was silent for SILENT_S."""
    return is_running(part["pid"]) if part["pids"] == pid_space() else part["seen_s_ago"] < SILENT_S
