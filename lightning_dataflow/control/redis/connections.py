"""Connections to a Redis: an address, and commands sent to it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_dataflow.contracts import UserError

CONNECT_S, ANSWER_S = 5.0, 10.0
INSTALL = "pip install 'lightning-dataflow[redis]'"

Argument = str | bytes | int | float


@dataclass(frozen=True, kw_only=True)
class RedisAddress:
    """Where a Redis is, and how to be let in.

    Attributes:
        address: `host:port`.
        username: of an ACL; None for the default user.
        tls: encrypt, and check the server's certificate by `ca_file` or the system's authorities.
        cert_file, key_file: of this client, where the server asks for one.
    """

    address: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Raises UserError for something else."""
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"channel.address={self.address} is no host:port: give both, for example 10.0.0.1:6379")
        return host.strip("[]"), int(port)


class RedisConnections:
    """As many connections as threads use at once. Each is used again without a look at it: one that the server has closed
    fails at the next command, which the caller sends again.

    redis-py's own pool asks the socket and counts for its metrics at every command, which costs as much as the command.

    Args:
        name: of this client, for the server's CLIENT LIST.
        on_connect: called for each new connection.

    Raises:
        UserError: redis-py is not installed, or a file of the address is not there.
    """

    def __init__(self, where: RedisAddress, name: str, on_connect: Callable[[], None]):
        redis = _library()
        self.errors = redis.exceptions
        self._on_connect = on_connect
        self._idle: list[Any] = []
        self._pid = os.getpid()
        self._class = redis.SSLConnection if where.tls else redis.Connection
        host, port = where.host_and_port
        self._options: dict[str, Any] = {
            "host": host,
            "port": port,
            "username": where.username,
            "password": where.password,
            "socket_connect_timeout": CONNECT_S,
            "socket_timeout": ANSWER_S,
            "socket_keepalive": True,
            "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
            "protocol": 2,
            "client_name": name,
            "redis_connect_func": self._connected,
        }
        if where.tls:
            for file in ("ca_file", "cert_file", "key_file"):
                if (path := getattr(where, file)) is not None and not os.path.isfile(path):
                    raise UserError(f"channel.{file}={path}: there is no such file")
            self._options |= {
                "ssl_ca_certs": where.ca_file,
                "ssl_certfile": where.cert_file,
                "ssl_keyfile": where.key_file,
            }

    def send(self, *command: Argument) -> Any:
        """Send a command; returns the reply."""
        return self.send_all([command])[0]

    def send_all(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Send commands at once; returns the replies. An error of one is raised when all replies are there."""
        connection = self._take()
        try:
            if len(commands) == 1:
                connection.send_command(*commands[0])
            else:
                connection.send_packed_command(connection.pack_commands(commands))
            replies = [self._read(connection) for _ in commands]
        except BaseException:  # an interrupt too: the next command must not get this one's reply
            connection.disconnect()
            raise
        finally:
            self._idle.append(connection)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def close(self) -> None:
        """Disconnect; the next command connects again."""
        while self._idle:
            self._idle.pop().disconnect()

    def _take(self) -> Any:
        if self._pid != os.getpid():  # a fork must not talk on its parent's
            self._idle, self._pid = [], os.getpid()
        try:
            return self._idle.pop()
        except IndexError:
            return self._class(**self._options)

    def _read(self, connection: Any) -> Any:
        try:
            return connection.read_response()
        except self.errors.ResponseError as error:
            return error

    def _connected(self, connection: Any) -> None:
        connection.on_connect()
        self._on_connect()


def _library() -> Any:
    try:
        import redis
    except ImportError as error:
        raise UserError(f"channel=redis needs redis-py: {INSTALL}") from error
    return redis
