"""A connection to Redis for one run: patient while the server is away, and certain that each change happens once."""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from lightning_dataflow.contracts import CapacityError, PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.contracts.errors import TAKEN_OVER
from lightning_dataflow.control.redis.connections import CONNECT_S, Argument, RedisAddress, RedisConnections
from lightning_dataflow.control.redis.scripts import ALLOW_OOM, Script

PREFIX = "ldf"
KEYS = (
    "card",
    "lines",
    "index",
    "totals",
    "clients",
    "rows",
    "wanted",
    "leased",
    "holders",
    "parts",
    "failed",
    "nonce",
)
OLDEST = (7, 0)
"""The first version of Redis whose scripts have flags."""
PATIENCE_S = 60.0
PAUSE_S = (0.01, 0.5)


class RedisServer:
    """Keys of one run, `ldf:{RUN}:…`, on one server. Safe for threads.

    A call waits while the server cannot be reached, for `patience_s` at most, and then goes on: a change that it had made
    before the connection broke is not made twice.

    Args:
        patience_s: how long a call waits for a server that went away. At the start nothing is waited for.

    Raises:
        UserError: nobody, or something else, answers at the address; or the server is too old or evicts keys.
        PermissionError: it does not let us in.
    """

    def __init__(self, where: RedisAddress, run_id: str, *, patience_s: float = PATIENCE_S):
        self.where = where
        self.run_id = run_id
        self.patience_s = patience_s
        self.name = f"Redis at {where.address}"
        self.num_connections = 0
        self._connections = self._connect()
        self._errors = self._connections.errors
        self._lock = threading.Lock()
        self._client = secrets.token_hex(8)
        self._acked = self._request = 0
        self._lost: PeerFailedError | None = None
        self._keys = [self.key(name) for name in KEYS]
        self.term = ""
        """Of the claim that this process's changes belong to; whoever claimed later refuses them."""
        self.check()

    def key(self, name: str) -> str:
        """A key of the run. The braces keep all of them in one slot of a cluster."""
        return f"{PREFIX}:{{{self.run_id}}}:{name}"

    @property
    def keys(self) -> list[str]:
        """All keys that a run can have."""
        return self._keys

    def change(
        self,
        script: Script,
        operation: str,
        *arguments: Argument,
        listed: Sequence[Argument] = (),
    ) -> Any:
        """Run an operation of `script` once; returns its result.

        Args:
            listed: of any length, behind the arguments.

        Raises:
            PeerTimeoutError: the server stayed away; whether the change was made is not known.
            PeerFailedError: the server lost what this process had written, or another process has claimed the run since
                this one was given its `term`.
            CapacityError: its memory is full.
        """
        with self._lock:
            self._request += 1
            what = (self.term, operation, len(arguments), *arguments, *listed)
            command = (*self._keys, self._client, self._acked, self._request, *what)
            reply = self.patiently(lambda: self._evaluate(script, command))
            self._acked = self._request
            return orjson.loads(reply)

    def ask(self, *command: Argument) -> Any:
        """Send a command that may be sent twice; returns the reply as it comes."""
        return self.patiently(lambda: self._connections.send(*command))

    def ask_all(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Send such commands at once."""
        return self.patiently(lambda: self._connections.send_all(commands))

    def ask_script(self, script: Script, *arguments: str | int) -> Any:
        """Run a script that writes nothing."""
        return self.patiently(lambda: self._evaluate(script, (*self.keys, *arguments)))

    def leave(self) -> None:
        """Say that this process is done with the run, and disconnect. The last that leaves a completed run removes it."""
        if self._request and self._lost is None:
            command = (*self._keys, self._client, int(self.patience_s))  # one that was silent for longer has died
            with contextlib.suppress(PeerTimeoutError, PeerFailedError):
                self.patiently(lambda: self._evaluate(_LEAVE, command), at_most_s=CONNECT_S)
        self._connections.close()

    def check(self) -> None:
        """Raise UserError unless this is a Redis that can be used, PermissionError if it refuses us."""
        errors = self._errors
        try:
            text = self._connections.send("INFO")
        except errors.AuthenticationError as error:
            raise self._refused(error) from error
        except (errors.ConnectionError, errors.TimeoutError, errors.InvalidResponse, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"no Redis answers at {self.where.address} ({_first_line(error)}): start one there, or correct "
                f"channel.address or channel.tls (now {str(self.where.tls).lower()}); see docs/redis.md"
            ) from error
        except errors.ResponseError as error:
            raise self._explained(error) from error
        lines = text.decode(errors="replace").splitlines() if isinstance(text, bytes) else []
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        version = info.get("redis_version", "")
        try:
            parts = tuple(int(part) for part in version.split(".")[:2])
        except ValueError:
            parts = ()
        if parts < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise UserError(f"{self.name} has version {version or 'unknown'}, needed is {oldest} or newer: upgrade it")
        if info.get("redis_mode") == "cluster":
            raise UserError(f"{self.name} is a node of a cluster: use one server, with a replica for failover if you like")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy.startswith("allkeys"):
            raise UserError(
                f"{self.name} drops keys when its memory is full (maxmemory-policy {policy}), which would lose samples: "
                "set maxmemory-policy noeviction"
            )

    def patiently(self, action: Callable[[], Any], *, at_most_s: float | None = None) -> Any:
        """Do it, again and again while the server is away."""
        errors, pause, patience = self._errors, PAUSE_S[0], at_most_s or self.patience_s
        deadline = time.monotonic() + patience
        while True:
            if self._lost is not None:
                raise self._lost
            try:
                return action()
            except (errors.AuthenticationError, errors.AuthorizationError) as error:
                raise self._refused(error) from error
            except (errors.ConnectionError, errors.TimeoutError, errors.ReadOnlyError, OSError) as error:
                if time.monotonic() > deadline:
                    raise PeerTimeoutError(
                        f"{self.name} could not be used for {patience:.0f} s ({_first_line(error)}): is it running, and "
                        "can this machine reach it? Start it, then resume with ckpt_path=last"
                    ) from error
            except errors.ResponseError as error:
                if not str(error).startswith("BUSY") or time.monotonic() > deadline:  # with somebody's long script
                    raise self._explained(error) from error
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_S[1])

    def lost(self, what: str) -> PeerFailedError:
        """The error of every call from now on: the server is not the one that it was."""
        self._lost = PeerFailedError(
            f"{self.name} lost {what}: it restarted without its append-only file, or failed over to a replica that was "
            "behind. Set appendonly yes (docs/redis.md), then resume with ckpt_path=last"
        )
        return self._lost

    def _connect(self) -> RedisConnections:
        return RedisConnections(self.where, f"{PREFIX}-{self.run_id}", self._connected)

    def _connected(self) -> None:
        self.num_connections += 1

    def _evaluate(self, script: Script, arguments: Sequence[Any]) -> Any:
        try:
            return self._connections.send("EVALSHA", script.sha, len(KEYS), *arguments)
        except self._errors.NoScriptError:
            return self._connections.send("EVAL", script.text, len(KEYS), *arguments)

    def _explained(self, error: Exception) -> Exception:
        text = _first_line(error)
        if text.startswith("LOST"):
            return self.lost("what this process had written there")
        if text.startswith("TAKEN"):
            return PeerFailedError(TAKEN_OVER.format(text.removeprefix("TAKEN ")))
        if isinstance(error, self._errors.OutOfMemoryError) or text.startswith("OOM"):
            return CapacityError(
                f"{self.name} has no memory left: raise its maxmemory, write checkpoints more often (what is behind them "
                "is dropped), or remove runs that nobody resumes with lightning-dataflow clean"
            )
        if isinstance(error, self._errors.NoPermissionError) or text.startswith(("NOPERM", "NOAUTH")):
            return self._refused(error)
        return PeerFailedError(f"{self.name} answers: {text}")

    def _refused(self, error: Exception) -> PermissionError:
        return PermissionError(
            f"{self.name} refuses this user ({_first_line(error)}): check channel.username and the password in "
            "channel.secret_file; docs/redis.md lists what the user must be allowed"
        )


_LEAVE = Script(
    """
local totals, clients = KEYS[4], KEYS[5]
redis.call('HDEL', clients, ARGV[1])
if redis.call('HGET', totals, 'finished') ~= 'completed' then
  return
end
local oldest = redis.call('TIME')[1] - ARGV[2]
for _, text in ipairs(redis.call('HVALS', clients)) do
  if tonumber(string.match(text, '^%d+ (%d+)')) > oldest then
    return
  end
end
redis.call('DEL', unpack(KEYS))
""",
    ALLOW_OOM,
)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].rstrip(".")[:200]
