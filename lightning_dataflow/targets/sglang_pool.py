"""Which capture server is asked next, and when one that is gone is asked again."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_dataflow.contracts import PeerFailedError, PeerGoneError, UserError
from lightning_dataflow.targets.sglang_http import CaptureServer

LOOK_S = 1.0
LONGEST_LOOK_S = 30.0


@dataclass
class Member:
    """A server, and what became of the requests to it.

    Attributes:
        probe: the same server, of less patience, to look whether it is back.
        gone: why it is not asked; None where it is.
        num_lost: requests that it lost in a row.
        lost_since: when the first of these was.
    """

    server: CaptureServer
    probe: CaptureServer
    in_flight: int = 0
    gone: str | None = None
    last_look: float = 0.0
    next_look: float = 0.0
    num_lost: int = 0
    lost_since: float | None = None


class ServerPool:
    """Hands out servers, the least busy first. Thread-safe.

    One that loses a request is gone until `admit` takes it back: it is looked at after 1 s, and after twice as long for
    every further request that it lost in a row.

    Args:
        admit: raises PeerGoneError or UserError where `probe` may not be used. One thread at a time calls it.
        in_flight: requests at a time and server.
        absence_s: how long all servers may be gone, or lose all that they are asked for, before the run fails.
    """

    def __init__(
        self, members: Sequence[Member], *, admit: Callable[[CaptureServer], None], in_flight: int, absence_s: float
    ):
        self.members = list(members)
        self.absence_s = absence_s
        self._admit, self._in_flight = admit, in_flight
        self._changed = threading.Condition()
        self._all_gone_since: float | None = None
        self._looking = self._stopping = False

    def take(self) -> Member:
        """A server that is there and has a place, which is waited for; looks after those that are gone meanwhile.

        Raises:
            PeerFailedError: all were gone for too long.
            PeerGoneError: this process is ending.
        """
        while True:
            with self._changed:
                if self._stopping:
                    raise PeerGoneError("this process is ending: no capture server is asked any more")
                there = [member for member in self.members if member.gone is None]
                free = [member for member in there if member.in_flight < self._in_flight]
                if free:
                    member = min(free, key=lambda one: one.in_flight)
                    member.in_flight += 1
                    return member
                due = self._due(bool(there))
                if due is None:
                    self._changed.wait(LOOK_S / 10)
                    continue
                self._looking = True
            try:
                self._look(due)
            finally:
                with self._changed:
                    self._looking = False
                    self._changed.notify_all()

    def give_back(self, member: Member, *, lost: str | None = None) -> None:
        """A request has ended; `lost` says why it got no answer.

        Raises:
            PeerFailedError: no server has answered anything for too long, though they come back.
        """
        now = time.monotonic()
        with self._changed:
            member.in_flight -= 1
            self._changed.notify_all()
            if lost is None:
                member.num_lost, member.lost_since = 0, None
                return
            member.lost_since = member.lost_since or now
            if member.gone is None and not self._stopping:
                print(f"lost a capture server: {lost}", flush=True)
                member.num_lost += 1
                member.next_look = now + min(LOOK_S * 2 ** (member.num_lost - 1), LONGEST_LOOK_S)
            member.gone = lost
            if self._all_gone_since is None and all(one.gone is not None for one in self.members):
                self._all_gone_since = now
            since = [one.lost_since for one in self.members if one.lost_since is not None]
            if len(since) == len(self.members) and now - max(since) > self.absence_s:
                raise PeerFailedError(f"no capture server answered for {now - max(since):.0f} s: {self._reasons()}")

    def stop_waiting(self) -> None:
        """Whoever waits for a server, or for its answer, gets a PeerGoneError at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for member in self.members:
            member.server.stop_waiting()
            member.probe.stop_waiting()

    def _due(self, some_are_there: bool) -> Member | None:
        """The server to look at now, where nobody looks already."""
        if self._looking:
            return None
        now = time.monotonic()
        since = self._all_gone_since
        expired = since is not None and now - since > self.absence_s
        if not some_are_there and expired and all(member.last_look > (since or 0.0) for member in self.members):
            raise PeerFailedError(f"no capture server is left: {self._reasons()}")
        gone = [member for member in self.members if member.gone is not None and member.next_look <= now]
        return min(gone, key=lambda one: one.next_look, default=None)

    def _look(self, member: Member) -> None:
        """Whether a server that was gone is back, and still of use; a refusal is no prompt's fault."""
        began = time.monotonic()
        try:
            self._admit(member.probe)
        except (PeerGoneError, UserError) as error:
            with self._changed:
                now = time.monotonic()
                member.gone, member.last_look = str(error), now
                member.next_look = now + min(max(LOOK_S, 3 * (now - began)), LONGEST_LOOK_S)
            return
        finally:
            member.probe.close()
        with self._changed:
            member.gone = self._all_gone_since = None
        print(f"the capture server at {member.server.url} is back", flush=True)

    def _reasons(self) -> str:
        return "; ".join(member.gone or "back" for member in self.members)
