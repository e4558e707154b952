"""Chooses the capture server of each request, and checks again on servers that were lost."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_dataflow.contracts import PeerFailedError, PeerGoneError, UserError
from lightning_dataflow.contracts.waiting import Wait
from lightning_dataflow.targets.sglang_http import CaptureServer

POLL_S = 0.1
PROBE_PAUSE_S = 1.0
LONGEST_PROBE_PAUSE_S = 30.0

logger = logging.getLogger(__name__)


@dataclass
class Member:
    """A server and its state.

    Attributes:
        probe: a client of the same server with a short timeout, to check whether a lost server is back.
        lost: why the server is not used; None while it is.
        num_lost: requests in a row that it did not answer.
        lost_since: since when it has answered no request; None once it has answered one.
    """

    server: CaptureServer
    probe: CaptureServer
    in_flight: int = 0
    lost: str | None = None
    last_probe: float = 0.0
    next_probe: float = 0.0
    num_lost: int = 0
    lost_since: float | None = None


class ServerPool:
    """Hands out the least busy server. Thread-safe.

    A server that leaves a request unanswered is lost until `admit` accepts it again. It is probed after one second, and
    after twice as long for every further request in a row that it leaves unanswered.

    Args:
        admit: raises PeerGoneError or UserError unless the server can be used. Only one thread at a time calls it.
        in_flight: requests at a time and server.
        absence_s: the run fails after no server has answered a request for this long, whether they pass `admit` or not.
    """

    def __init__(
        self, members: Sequence[Member], *, admit: Callable[[CaptureServer], None], in_flight: int, absence_s: float
    ):
        self.members = list(members)
        self.absence_s = absence_s
        self._admit, self._in_flight = admit, in_flight
        self._changed = threading.Condition()
        self._probing = self._stopping = False
        # One for the pool, so that of many waiting threads a single one says it.
        self._absence = Wait(lambda: f"a capture server to answer: {self._reasons()}")

    def take(self) -> Member:
        """Wait for a server with a free place, and probe lost servers meanwhile.

        Raises:
            PeerFailedError: no server has answered a request for too long.
            PeerGoneError: this process is ending.
        """
        while True:
            with self._changed:
                if self._stopping:
                    raise PeerGoneError("this process is ending: no capture server is asked any more")
                usable = [member for member in self.members if member.lost is None]
                free = [member for member in usable if member.in_flight < self._in_flight]
                if free:
                    member = min(free, key=lambda member: member.in_flight)
                    member.in_flight += 1
                    return member
                if not usable:
                    self._absence.seconds()
                    if not self._probing:
                        self._check_absence()
                due = self._due()
                if due is None:
                    self._changed.wait(POLL_S)
                    continue
                self._probing = True
            try:
                self._probe(due)
            finally:
                with self._changed:
                    self._probing = False
                    self._changed.notify_all()

    def give_back(self, member: Member, *, lost: str | None = None) -> None:
        """End a request; `lost` says why it was not answered.

        Raises:
            PeerFailedError: no server has answered a request for too long.
        """
        now = time.monotonic()
        with self._changed:
            member.in_flight -= 1
            self._changed.notify_all()
            if lost is None:
                self._absence.restart()
                member.num_lost = 0  # also if it answers an earlier request while it counts as lost
                member.lost_since = None if member.lost is None else now
                return
            member.lost_since = member.lost_since or now
            if member.lost is None and not self._stopping:
                logger.warning("lost a capture server: %s", lost)
                member.num_lost += 1
                member.next_probe = now + min(PROBE_PAUSE_S * 2 ** (member.num_lost - 1), LONGEST_PROBE_PAUSE_S)
            member.lost = lost
            self._check_absence()

    def stop_waiting(self) -> None:
        """Make all threads that wait for a server, or for its answer, raise PeerGoneError at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for member in self.members:
            member.server.stop_waiting()
            member.probe.stop_waiting()

    def _check_absence(self) -> None:
        """Fail when no server has answered for too long, and each was probed once more since."""
        since = [member.lost_since for member in self.members if member.lost_since is not None]
        if len(since) < len(self.members):
            return
        absent = time.monotonic() - max(since)
        if absent > self.absence_s and all(member.last_probe > max(since) for member in self.members):
            raise PeerFailedError(f"no capture server has answered for {absent:.0f} s: {self._reasons()}")

    def _reasons(self) -> str:
        return "; ".join(member.lost or "back" for member in self.members)

    def _due(self) -> Member | None:
        """The lost server to probe now; None while another thread probes."""
        now = time.monotonic()
        due = [member for member in self.members if member.lost is not None and member.next_probe <= now]
        return None if self._probing else min(due, key=lambda member: member.next_probe, default=None)

    def _probe(self, member: Member) -> None:
        began = time.monotonic()
        try:
            self._admit(member.probe)
            lost = None
        except (PeerGoneError, UserError) as error:
            lost = str(error)
        with self._changed:
            now = time.monotonic()
            member.lost, member.last_probe = lost, now
            member.next_probe = now + min(max(PROBE_PAUSE_S, 3 * (now - began)), LONGEST_PROBE_PAUSE_S)
        if lost is None:
            logger.info("the capture server at %s is back", member.server.url)
