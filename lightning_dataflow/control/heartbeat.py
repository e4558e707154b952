"""Signs of life of the processes of a run, and what follows when they stop."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.control.ledger import SILENT_S, MetadataStore
from lightning_dataflow.control.processes import is_running, pid_space

log = logging.getLogger(__name__)

EVERY_S = 2.0
FRESH_S = 10.0
CLOSE_S = 0.5
SUPERVISOR = "supervisor"
TRAINER = "trainer-0"


class Heartbeat:
    """A thread that reports `name` as alive every two seconds until `stop`.

    No error ends it, because then the leases of a working process would expire. Each type of error is logged once.

    Args:
        describe: what the process does or waits for now.
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
            self._ledger.report(self._name, last_words, failed=failed, fatal=fatal)
        except Exception as error:  # raising it would hide the error that ended the process
            log.warning("%s could not leave its last words (%r): %s", self._name, error, last_words)

    @contextmanager
    def until(self, last_words: str) -> Iterator[None]:
        """Stop when the block ends. An error, unless it is an interrupt, is reported; one in the settings is fatal."""
        try:
            yield
        except KeyboardInterrupt:
            self.stop("interrupted")
            raise
        except BaseException as error:
            self.stop(str(error) or type(error).__name__, failed=True, fatal=isinstance(error, UserError))
            raise
        self.stop(last_words)

    def _run(self) -> None:
        while True:
            self._beat()
            if self._stop.wait(EVERY_S):
                return

    def _beat(self) -> None:
        try:
            if self._renew_s is not None:
                self._ledger.renew(self._name, self._renew_s)
            self._ledger.report(self._name, self._describe())
        except (PeerTimeoutError, PeerFailedError):
            pass  # the process itself reports that the ledger does not answer, when it needs it
        except Exception as error:
            if type(error) not in self._logged:
                self._logged.add(type(error))
                log.warning("%s could not give a sign of life (%r); it goes on and tries again", self._name, error)


def end_leases(ledger: MetadataStore, pid: int) -> None:
    """End all leases of a process of this machine that has died, whatever the names of its workers."""
    for part in ledger.parts():
        if (part["pids"], part["pid"]) == (pid_space(), pid):
            ledger.renew(part["name"], 0)


def producer_failures(ledger: MetadataStore) -> list[str]:
    """Why no producer captures for this run any more; [] while one does, or none has reported a failure.

    An error in the settings would stop every producer, so the first one ends the run. After any other error, the run goes
    on while a producer lives, or a supervisor, which restarts producers or ends the run itself. A producer that died
    without a report may be restarted by whoever started it: only the reader's timeout ends that wait.
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

    A trainer that died does not count, however lately it was seen. This machine knows of its own processes; one elsewhere
    has FRESH_S for its next sign of life.
    """
    first, began = _trainer(ledger), time.monotonic()
    while first is not None and (part := _trainer(ledger)) is not None:
        if part["pids"] == pid_space():
            is_alive = part["pid"] != os.getpid() and part["seen_s_ago"] < FRESH_S and is_running(part["pid"])
        else:
            is_alive = part["seen_s_ago"] + CLOSE_S < first["seen_s_ago"] + time.monotonic() - began
            if not is_alive and part["seen_s_ago"] < FRESH_S:
                time.sleep(CLOSE_S)
                continue
        if is_alive:
            raise UserError(
                f"process {part['pid']} on {part['host']} trains run {run_id} ({part['state']}): end it first, or choose "
                "another run_name"
            )
        return


def claim_trainer(ledger: MetadataStore, run_id: str) -> None:
    """Become the only process that trains this run. Of several that try at the same moment, all but one are refused.

    Raises:
        UserError: see check_no_other_trainer.
    """
    while True:
        last = _last_trainer(ledger)
        check_no_other_trainer(ledger, run_id)
        if ledger.claim(TRAINER, "beginning", None if last is None else (last["host"], last["pid"])):
            return


def _trainer(ledger: MetadataStore) -> Mapping[str, Any] | None:
    return None if ledger.finished() is not None else _last_trainer(ledger)


def _last_trainer(ledger: MetadataStore) -> Mapping[str, Any] | None:
    return next((part for part in ledger.parts() if part["name"] == TRAINER), None)


def _is_alive(part: Mapping[str, Any]) -> bool:
    """A process on another machine counts as alive until it has been silent for SILENT_S."""
    return is_running(part["pid"]) if part["pids"] == pid_space() else part["seen_s_ago"] < SILENT_S
