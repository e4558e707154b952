"""What happens to a supervised run when one of its processes ends."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lightning_dataflow.checkpoints.markers import latest_checkpoint
from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.control import MetadataStore
from lightning_dataflow.control.heartbeat import end_leases
from lightning_dataflow.services.server import LocalServer
from lightning_dataflow.supervise.processes import POLL_S, ManagedProcess, wait_for_end

log = logging.getLogger(__name__)

FIRST_FAILURE_S = 1.0
"""When the trainer dies, wait this long: a dying producer may be the cause, and is then the one to report."""
PRODUCERS_END_S = 30.0
LONGEST_PAUSE_S = 8.0
"""Longest delay before a restart. It must stay below the 15 to 20 s that clients of a store wait for it."""
LEDGER_TIMEOUT_S = 90.0
"""How long restarts are put off while the ledger does not answer; the processes themselves wait for it as long."""
Answer = TypeVar("Answer")


@dataclass
class Restarts:
    """How often each process was restarted, and when the next restarts are due.

    Args:
        limit: for each process.
    """

    limit: int
    counts: dict[str, int] = field(default_factory=dict, init=False)
    _due: dict[str, float] = field(default_factory=dict, init=False)

    def plan(self, name: str, exit_reason: str, *, least_pause_s: float = 0.0) -> bool:
        """Plan a restart; False when the process has used all of them."""
        count = self.counts.get(name, 0)
        if count == self.limit:
            return False
        pause = max(min(2.0**count, LONGEST_PAUSE_S), least_pause_s)
        self.counts[name], self._due[name] = count + 1, time.monotonic() + pause
        log.warning("%s: %s; starts again in %.0f s, restart %d of %d", name, exit_reason, pause, count + 1, self.limit)
        return True

    def is_planned(self, name: str) -> bool:
        """Whether the process has ended and will be started again."""
        return name in self._due

    def is_due(self, name: str) -> bool:
        """Whether it should be started now."""
        return self._due.get(name, float("inf")) <= time.monotonic()

    def mark_started(self, name: str) -> None:
        """Record that the process was started again."""
        del self._due[name]


@dataclass
class Watch:
    """Watches all processes until the trainer and then the producers have ended, and restarts those that died.

    - A producer or trainer that found an error in its settings ends the run: it would find the same error again.
    - The run ends when a server or the trainer dies without restarts left, or when the last producer does.
    - Leases of a dead producer end at once. The same producer, when restarted, or the others capture those samples.
    - A restarted trainer continues from its newest checkpoint, or starts anew without one.
    - Nothing is started while the ledger does not answer, because a starting process does not wait for it.

    Raises:
        PeerFailedError: from `run`: the run cannot go on; names the process that failed, and why.
    """

    producers: Sequence[ManagedProcess]
    trainer: ManagedProcess
    servers: Sequence[LocalServer]
    ledger: MetadataStore
    run_dir: Path
    restarts: Restarts

    def __post_init__(self) -> None:
        self._trainer_started = self.ledger.now()
        self._exhausted: dict[str, str] = {}  # producers without restarts left: exit reasons by name
        self._dead_pids: list[int] = []  # of producers, which may hold leases
        self._ledger_away_since: float | None = None

    def run(self) -> None:
        """Return when all have ended."""
        while (status := self.trainer.process.poll()) != 0:
            if self._keep_servers_running():
                self._keep_producers_running()
                if status is not None:
                    self._on_trainer_death()
            time.sleep(POLL_S)
        for producer in wait_for_end(self.producers, PRODUCERS_END_S):
            log.warning("%s did not end within %.0f s of the trainer's end: killed", producer.name, PRODUCERS_END_S)
            producer.kill()

    def describe(self) -> str:
        """Status text for the supervisor's heartbeat."""
        counts = ", ".join(f"{name} ×{count}" for name, count in self.restarts.counts.items())
        return f"watching; started again: {counts or 'none'}"

    def _keep_servers_running(self) -> bool:
        return all(self._keep_running(server) for server in self.servers)

    def _keep_running(self, server: LocalServer) -> bool:
        """Whether a server runs; restarts it when that is due."""
        if (status := server.poll()) is None:
            return True
        if self.restarts.is_planned(server.name):
            return self.restarts.is_due(server.name) and self._restart(server)
        self._plan_restart(server, f"ended with status {status}")
        return False

    def _restart(self, server: LocalServer) -> bool:
        try:
            server.start()
        except UserError as error:
            server.stop()  # it may run, and not be ready
            self._plan_restart(server, f"did not start again ({error})")
            return False
        self.restarts.mark_started(server.name)
        kept = "its data was kept" if server.keeps_data else "its data was lost and will be captured again"
        log.warning("%s runs again; %s", server.name, kept)
        return True

    def _plan_restart(self, server: LocalServer, reason: str) -> None:
        if not self.restarts.plan(server.name, reason, least_pause_s=server.restart_pause_s):
            raise PeerFailedError(f"{server.name} {reason}, see {server.log_path}")

    def _keep_producers_running(self) -> None:
        for producer in self.producers:
            status = producer.process.poll()
            if status is None or producer.name in self._exhausted:
                continue
            if self.restarts.is_planned(producer.name):
                if self.restarts.is_due(producer.name) and self._ask_ledger(self.ledger.now) is not None:
                    producer.start()
                    self.restarts.mark_started(producer.name)
            elif status != 0:
                self._on_producer_death(producer)
            elif self._ask_ledger(lambda: self.ledger.finished(since=self._trainer_started) is None):
                producer.start()  # it ended with an earlier trainer
        with suppress(PeerTimeoutError):  # later, if the ledger does not answer
            while self._dead_pids:
                end_leases(self.ledger, self._dead_pids[0])
                self._dead_pids.pop(0)

    def _on_producer_death(self, producer: ManagedProcess) -> None:
        self._dead_pids.append(producer.process.pid)
        producer.kill()
        reason = producer.exit_reason()
        if not producer.is_retryable():
            raise PeerFailedError(f"{producer.name}: {reason}")
        if self.restarts.plan(producer.name, reason):
            return
        self._exhausted[producer.name] = reason
        left = [each.name for each in self.producers if each.name not in self._exhausted]
        if not left:
            raise PeerFailedError("; ".join(f"{name}: {reason}" for name, reason in self._exhausted.items()))
        log.warning("%s: %s; the run goes on with %s", producer.name, reason, ", ".join(left))

    def _on_trainer_death(self) -> None:
        trainer = self.trainer
        if self.restarts.is_planned(trainer.name):
            if self.restarts.is_due(trainer.name) and (now := self._ask_ledger(self.ledger.now)) is not None:
                self._trainer_started = now
                checkpoint = latest_checkpoint(self.run_dir / "checkpoints")
                trainer.start(*([] if checkpoint is None else ["ckpt_path=auto"]))
                self.restarts.mark_started(trainer.name)
            return
        trainer.kill()
        reason = trainer.exit_reason()
        time.sleep(FIRST_FAILURE_S)
        if self._keep_servers_running():
            self._keep_producers_running()  # raises if a producer is the cause
        if not trainer.is_retryable() or not self.restarts.plan(trainer.name, reason):
            raise PeerFailedError(f"{trainer.name}: {reason}")

    def _ask_ledger(self, question: Callable[[], Answer]) -> Answer | None:
        """The ledger's answer; None while it gives none. Raises PeerFailedError after LEDGER_TIMEOUT_S."""
        try:
            answer = question()
        except PeerTimeoutError as error:
            self._ledger_away_since = self._ledger_away_since or time.monotonic()
            if time.monotonic() - self._ledger_away_since > LEDGER_TIMEOUT_S:
                silence = f"the ledger has not answered for {LEDGER_TIMEOUT_S:.0f} s"
                raise PeerFailedError(f"cannot restart a process: {silence} ({error})") from error
            return None
        self._ledger_away_since = None
        return answer
