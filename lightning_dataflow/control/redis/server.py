"""A connection to Redis for one run: patient while the server is away, and certain that each change happens once."""

import contextlib
import secrets
import threading
from collections.abc import Callable
from typing import Any

import orjson

from lightning_dataflow.contracts import CapacityError, PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.contracts.errors import TAKEN_OVER
from lightning_dataflow.contracts.foreign import first_line
from lightning_dataflow.contracts.validation import check_schema
from lightning_dataflow.contracts.waiting import Wait
from lightning_dataflow.control.fields import damaged
from lightning_dataflow.control.redis.address import ANSWER_S, CONNECT_S, RedisAddress, redis_library
from lightning_dataflow.control.redis.scripts import LEAVE, READ, Script

PREFIX = "ldf"
KEYS = ("card", "nonce", "log", "totals", "clients", "samples", "open", "parts", "date")
"""Of a run; the scripts know them by this order."""
OLDEST = (7, 0)
"""The first version of Redis whose scripts have flags."""
MAX_REPLY_BYTES = 512 << 20
"""Of values that other processes wrote: about three million samples in flight."""
PATIENCE_S = 90.0
"""A server that stands still for a minute, and comes back, ends nothing."""
PAUSE_S = (0.01, 0.5)
INTERRUPTED_RUN = "resume with ckpt_path=last"

Argument = str | bytes | int | float


class RedisServer:
    """Keys of one run, `ldf:{RUN}:…`, on one server. Safe for threads.

    A call waits while the server cannot be reached, for `patience_s` at most, and then goes on: a change that it had made
    before the connection broke is not made twice.

    Args:
        patience_s: how long a call waits for a server that went away. At the start nothing is waited for.

    Raises:
        UserError: nobody, or something else, answers at the address; or the server is too old or evicts keys; or another
            release wrote the run.
        PermissionError: it does not let us in.
    """

    def __init__(self, where: RedisAddress, run_id: str, *, patience_s: float = PATIENCE_S):
        redis = redis_library()
        self.where = where
        self.run_id = run_id
        self.patience_s = patience_s
        self.name = f"Redis at {where.address}"
        self.keys = [self.key(name) for name in KEYS]
        self.term = ""
        """Of the claim that this process's changes belong to; whoever claimed later refuses them."""
        self._errors = redis.exceptions
        self._refusals = (self._errors.AuthenticationError, self._errors.AuthorizationError, self._errors.NoPermissionError)
        self._pool = where.connection_pool(f"{PREFIX}-{run_id}")
        errors = (self._errors.ConnectionError, self._errors.TimeoutError, self._errors.ResponseError, OSError)
        self._retry = redis.retry.Retry(redis.backoff.ExponentialBackoff(PAUSE_S[1], PAUSE_S[0]), -1, errors)
        self._lock = threading.Lock()
        self._client = secrets.token_hex(8)
        self._acked = self._request = 0
        self._lost: PeerFailedError | None = None
        self.check()
        if run_id:
            self._check_release()

    def key(self, name: str) -> str:
        """A key of the run. The braces keep all of them in one slot of a cluster."""
        return f"{PREFIX}:{{{self.run_id}}}:{name}"

    def change(self, script: Script, operation: str, *arguments: Any) -> Any:
        """Run an operation of `script` once; returns its result. Arguments and result are plain data.

        Raises:
            PeerTimeoutError: the server stayed away; whether the change was made is not known.
            PeerFailedError: the server lost what this process had written, or another process has claimed the run since
                this one was given its `term`.
            CapacityError: its memory is full.
        """
        with self._lock:
            self._request += 1
            command = (self._client, self._acked, self._request, self.term, operation, orjson.dumps(arguments))
            reply = self._patiently(lambda: self._evaluate(script, *command))
            self._acked = self._request
            try:
                return orjson.loads(reply)
            except ValueError as error:
                raise PeerFailedError(f"{self.name} answers {operation} with what is no JSON: {_reason(error)}") from error

    def ask(self, *command: Argument) -> Any:
        """Send a command that may be sent twice; returns the reply as it comes."""
        return self._patiently(lambda: self._send(*command))

    def read(self, *command: Argument) -> Any:
        """Like `ask`, for a command on a key whose value may have any size.

        Raises:
            UserError: the reply would have more than MAX_REPLY_BYTES.
        """
        return self._patiently(lambda: self._evaluate(READ, MAX_REPLY_BYTES, *command))

    def leave(self) -> None:
        """Say that this process is done with the run, and disconnect. The last that leaves a completed run removes it."""
        if self._request and self._lost is None:
            with contextlib.suppress(PeerTimeoutError, PeerFailedError):
                command = (self._client, int(self.patience_s))
                self._patiently(lambda: self._evaluate(LEAVE, *command), at_most_s=CONNECT_S)
        self._pool.disconnect()

    def check(self) -> None:
        """Raise UserError unless this is a Redis that can be used, PermissionError if it refuses us."""
        errors = self._errors
        try:
            lines = self._send("INFO").decode().splitlines()
        except (*self._refusals, errors.ResponseError) as error:
            raise self._explained(error) from error
        except (errors.ConnectionError, errors.TimeoutError, errors.InvalidResponse, OSError, ValueError) as error:
            raise UserError(
                f"no Redis answers at {self.where.address} ({_reason(error)}): start one there, or correct "
                f"channel.address or channel.tls (now {str(self.where.tls).lower()}); see docs/redis.md"
            ) from error
        self._check_info(dict(line.split(":", 1) for line in lines if ":" in line))

    def lost(self, what: str) -> PeerFailedError:
        """The error of every call from now on: the server no longer knows what it once did."""
        self._lost = PeerFailedError(
            f"{self.name} lost {what}: it restarted without its append-only file, or failed over to a replica that was "
            f"behind. Set appendonly yes (docs/redis.md), then {INTERRUPTED_RUN}"
        )
        return self._lost

    def _check_info(self, info: dict[str, str]) -> None:
        version = info.get("redis_version", "")
        numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
        if tuple(numbers) < OLDEST:
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

    def _check_release(self) -> None:
        """What another release keeps of a run is under other keys."""
        try:
            version = orjson.loads(self.read("GET", self.key("card")) or b"{}")["schema_version"]
        except (ValueError, TypeError, KeyError):
            return  # not announced yet; the log reports a damaged card
        check_schema(version, f"{self.name}, run {self.run_id},", "use that release for it, or choose another run_name")

    def _patiently(self, action: Callable[[], Any], *, at_most_s: float | None = None) -> Any:
        """Do it, again and again while the server is away."""
        if self._lost is not None:
            raise self._lost
        patience = at_most_s or self.patience_s
        wait = Wait(f"{self.name} to answer", longest_call_s=ANSWER_S + CONNECT_S)

        def give_up_when_late(error: Exception) -> None:
            if wait.seconds() > patience:
                raise PeerTimeoutError(
                    f"{self.name} could not be used for {patience:.0f} s ({_reason(error)}): is it running, and "
                    f"can this machine reach it? Start it, then {INTERRUPTED_RUN}"
                ) from error

        try:
            return self._retry.call_with_retry(action, give_up_when_late, self._may_pass)
        except (*self._refusals, self._errors.ResponseError) as error:
            raise self._explained(error) from error

    def _may_pass(self, error: Exception) -> bool:
        """Whether to try again: the server is away, read-only during a failover, or busy with a long script."""
        if isinstance(error, self._refusals):
            return False
        is_refusal = isinstance(error, self._errors.ResponseError) and not isinstance(error, self._errors.ReadOnlyError)
        return not is_refusal or str(error).startswith("BUSY")

    def _send(self, *command: Argument) -> Any:
        connection = self._pool.get_connection()
        try:
            connection.send_command(*command)
            return connection.read_response()
        except self._errors.ResponseError:
            raise
        except BaseException:  # an interrupt too: the next command must not get this one's reply
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def _evaluate(self, script: Script, *arguments: Argument) -> Any:
        try:
            return self._send("EVALSHA", script.sha, len(KEYS), *self.keys, *arguments)
        except self._errors.NoScriptError:
            return self._send("EVAL", script.text, len(KEYS), *self.keys, *arguments)

    def _explained(self, error: Exception) -> Exception:
        text = _reason(error)
        if text.startswith("LOST"):
            return self.lost("what this process had written there")
        if text.startswith("DAMAGED"):
            return damaged(text.removeprefix("DAMAGED ").split(" script: ")[0], f"in {self.name}")
        if text.startswith("TAKEN"):
            return PeerFailedError(TAKEN_OVER.format(text.removeprefix("TAKEN ")))
        if isinstance(error, self._errors.OutOfMemoryError) or text.startswith("OOM"):
            return CapacityError(
                f"{self.name} has no memory left: raise its maxmemory, write checkpoints more often (what is behind them "
                "is dropped), or remove runs that nobody resumes with lightning-dataflow clean"
            )
        if isinstance(error, self._refusals) or text.startswith(("NOPERM", "NOAUTH")):
            return PermissionError(
                f"{self.name} refuses this user ({text}): check channel.username and the password in "
                "channel.secret_file; docs/redis.md lists what the user must be allowed"
            )
        return PeerFailedError(f"{self.name} answers: {text}")


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".")
