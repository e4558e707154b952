"""What becomes of a supervised run when one of its parts ends."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lightning_dataflow.checkpoints.markers import latest_checkpoint
from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError
from lightning_dataflow.control import MetadataStore
from lightning_dataflow.control.heartbeat import end_leases
from lightning_dataflow.services.server import LocalServer
from lightning_dataflow.supervise.processes import POLL_S, Part

FIRST_FAILURE_S = 1.0
"""A part that fails can make others fail; the first in the order of starting is the cause."""
PRODUCERS_END_S = 30.0
LONGEST_PAUSE_S = 8.0
"""Before a part is started again: a store's clients wait for 15 to 20 s."""
LEDGER_AWAY_S = 60.0
"""How long what needs the ledger is put off while it cannot be used; as long as the parts themselves wait for it."""
Answer = TypeVar("Answer")


class Restarts:
    """How often parts were started again, and when the next ones will be.

    Args:
        limit: for each part.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.counts: dict[str, int] = {}
        self._due: dict[str, float] = {}

    def plan(self, name: str, how_it_ended: str, *, least_pause_s: float = 0.0) -> bool:
        """False when the part has used up its restarts."""
        count = self.counts.get(name, 0)
        if count == self.limit:
            return False
        pause = max(min(2.0**count, LONGEST_PAUSE_S), least_pause_s)
        self.counts[name], self._due[name] = count + 1, time.monotonic() + pause
        say(f"{name}: {how_it_ended}; starts again in {pause:.0f} s, attempt {count + 1} of {self.limit}")
        return True

    def is_planned(self, name: str) -> bool:
        """Whether the part has ended and will be started again."""
        return name in self._due

    def is_due(self, name: str) -> bool:
        """Whether that is now, until it is `done`."""
        return self._due.get(name, float("inf")) <= time.monotonic()

    def done(self, name: str) -> None:
        """The part was started again."""
        del self._due[name]


class Watch:
    """Watches all parts until the trainer and then the producers have ended, and starts again what died.

    - A producer or trainer that found an error in its settings ends the run: it would find it again.
    - The store and the trainer end the run when they die and have used up their restarts; producers when the last did.
    - Samples that a dead producer had leased are free at once. Its own restart, or the others, capture them.
    - A trainer goes on at its newest checkpoint, or at the start where it wrote none.
    - While the ledger is away nothing is started: parts that begin do not wait for it.

    Raises:
        PeerFailedError: from `run`: the run cannot go on; names who failed, and how.
    """

    def __init__(
        self,
        producers: Sequence[Part],
        trainer: Part,
        servers: Sequence[LocalServer],
        ledger: MetadataStore,
        run_dir: Path,
        restarts: Restarts,
    ):
        self._producers = producers
        self._trainer = trainer
        self._servers = servers
        self._ledger = ledger
        self._run_dir = run_dir
        self._restarts = restarts
        self._trainer_started = self._ledger.now()
        self._lost: dict[str, str] = {}  # producers that will not be started again
        self._holders: list[int] = []  # processes of dead producers, which may hold leases
        self._away_since: float | None = None  # the ledger

    def run(self) -> None:
        """Until all have ended."""
        while (status := self._trainer.process.poll()) != 0:
            if self._servers_are_up():
                self._look_after_producers()
                if status is not None:
                    self._look_after_trainer()
            time.sleep(POLL_S)
        self._wait_for_producers()

    def describe(self) -> str:
        """For signs of life."""
        counts = ", ".join(f"{name} ×{count}" for name, count in self._restarts.counts.items())
        return f"watching; started again: {counts or 'none'}"

    def _servers_are_up(self) -> bool:
        return all(self._is_up(server) for server in self._servers)

    def _is_up(self, server: LocalServer) -> bool:
        if (status := server.poll()) is None:
            return True
        if self._restarts.is_planned(server.name):
            if not self._restarts.is_due(server.name):
                return False
            server.start()
            self._restarts.done(server.name)
            say(f"{server.name} runs again; {'it has its data' if server.keeps_data else 'its data is captured again'}")
            return True
        if not self._restarts.plan(server.name, f"ended with status {status}", least_pause_s=server.restart_pause_s):
            raise PeerFailedError(f"{server.name} ended with status {status}, see {server.log_path}")
        return False

    def _look_after_producers(self) -> None:
        for part in self._producers:
            status = part.process.poll()
            if status is None or part.name in self._lost:
                continue
            if self._restarts.is_planned(part.name):
                if self._restarts.is_due(part.name) and self._ask(self._ledger.now) is not None:
                    part.start()
                    self._restarts.done(part.name)
            elif status == 0:
                if self._ask(lambda: self._ledger.finished(since=self._trainer_started) is None):
                    part.start()  # it ended with an earlier trainer
            else:
                self._bury(part)
        self._end_leases()

    def _bury(self, part: Part) -> None:
        """A producer failed."""
        self._holders.append(part.process.pid)
        part.kill()
        how = part.how_it_ended()
        if part.may_do_better() and self._restarts.plan(part.name, how):
            return
        self._lost[part.name] = how
        left = [one.name for one in self._producers if one.name not in self._lost]
        if not part.may_do_better() or not left:
            failures = self._lost if part.may_do_better() else {part.name: how}
            raise PeerFailedError("; ".join(f"{name}: {how}" for name, how in failures.items()))
        say(f"{part.name}: {how}; the run goes on with {', '.join(left)}")

    def _look_after_trainer(self) -> None:
        """It failed."""
        trainer = self._trainer
        if self._restarts.is_planned(trainer.name):
            if self._restarts.is_due(trainer.name) and (now := self._ask(self._ledger.now)) is not None:
                self._trainer_started = now
                written = latest_checkpoint(self._run_dir / "checkpoints")
                trainer.start(*([] if written is None else ["ckpt_path=auto"]))
                self._restarts.done(trainer.name)
            return
        trainer.kill()
        how = trainer.how_it_ended()
        time.sleep(FIRST_FAILURE_S)
        if self._servers_are_up():
            self._look_after_producers()  # the cause, maybe
        if not trainer.may_do_better() or not self._restarts.plan(trainer.name, how):
            raise PeerFailedError(f"{trainer.name}: {how}")

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """What the ledger answers; None while it is away. Raises PeerFailedError when it stays away."""
        try:
            answer = question()
        except PeerTimeoutError as error:
            self._away_since = self._away_since or time.monotonic()
            if time.monotonic() - self._away_since > LEDGER_AWAY_S:
                raise PeerFailedError(f"a part has ended and cannot be started again: {error}") from error
            return None
        self._away_since = None
        return answer

    def _end_leases(self) -> None:
        """Of dead producers, or later, when the ledger is there again."""
        with suppress(PeerTimeoutError):
            while self._holders:
                end_leases(self._ledger, self._holders[0])
                self._holders.pop(0)

    def _wait_for_producers(self) -> None:
        """The run is complete, whatever becomes of them."""
        deadline = time.monotonic() + PRODUCERS_END_S
        running = list(self._producers)
        while running := [part for part in running if part.process.poll() is None]:
            if time.monotonic() > deadline:
                names = ", ".join(part.name for part in running)
                print(
                    f"[supervisor] {names} did not end within {PRODUCERS_END_S:.0f} s of the trainer's end: ended",
                    flush=True,
                )
                for part in running:
                    part.kill()
                break
            time.sleep(POLL_S)
        for part in (*self._producers, self._trainer):
            part.drain()


def say(text: str) -> None:
    """Print a line among those of the parts."""
    print(f"[supervisor] {text}", flush=True)
