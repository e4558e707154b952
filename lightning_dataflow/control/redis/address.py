"""Where a Redis is, and how to be let in."""

import os
from dataclasses import dataclass, field
from typing import Any

from lightning_dataflow.contracts import UserError

CONNECT_S, ANSWER_S = 5.0, 10.0
INSTALL = "pip install 'lightning-dataflow[redis]'"


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

    def connection_pool(self, name: str) -> Any:
        """redis-py's connections to it, under that name in the server's CLIENT LIST.

        Raises:
            UserError: redis-py is not installed, or a file of the address is missing.
        """
        redis = redis_library()
        host, port = self.host_and_port
        return redis.ConnectionPool(
            connection_class=redis.SSLConnection if self.tls else redis.Connection,
            host=host,
            port=port,
            username=self.username,
            password=self.password,
            socket_connect_timeout=CONNECT_S,
            socket_timeout=ANSWER_S,
            socket_keepalive=True,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),  # RedisServer retries whole commands
            protocol=2,
            client_name=name,
            **self._tls_options(),
        )

    def _tls_options(self) -> dict[str, str | None]:
        if not self.tls:
            return {}
        for name in ("ca_file", "cert_file", "key_file"):
            if (path := getattr(self, name)) is not None and not os.path.isfile(path):
                raise UserError(f"channel.{name}={path}: there is no such file")
        return {"ssl_ca_certs": self.ca_file, "ssl_certfile": self.cert_file, "ssl_keyfile": self.key_file}


def redis_library() -> Any:
    """redis-py. Raises UserError where it is not installed."""
    try:
        import redis
    except ImportError as error:
        raise UserError(f"channel=redis needs redis-py: {INSTALL}") from error
    return redis
