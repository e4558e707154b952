"""Runs in a Redis, for the commands that look at them from outside."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_dataflow.config.files import redis_address
from lightning_dataflow.config.run_id import run_id
from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.contracts.foreign import one_line
from lightning_dataflow.control.redis.address import RedisAddress
from lightning_dataflow.control.redis.server import KEYS, PREFIX, RedisServer
from lightning_dataflow.services.redis import ADDRESS, SECRET

PATIENCE_S = 2.0
_KEY = re.compile(rf"{PREFIX}:\{{(.*)\}}:(?:{'|'.join(KEYS)})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how to reach a Redis; in the code they are named as the settings of `channel`."""
    parser.add_argument("--redis", dest="address", metavar="HOST:PORT", help="address of the Redis that holds the run")
    parser.add_argument("--redis-username", dest="username", metavar="NAME", help="Redis user; the default one if left out")
    parser.add_argument("--redis-secret-file", dest="secret_file", metavar="FILE", help="file with the password")
    parser.add_argument("--redis-tls", dest="tls", action="store_true", help="connect with TLS")
    for what, text in (("ca", "authorities that signed its certificate"), ("cert", "own certificate"), ("key", "own key")):
        parser.add_argument(f"--redis-{what}-file", dest=f"{what}_file", metavar="FILE", help=f"with TLS: {text}")


def address(options: argparse.Namespace) -> RedisAddress:
    """The Redis that these arguments name."""
    return redis_address(options, "--redis-secret-file")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with the message of an error, in which settings of `channel` become the arguments of the same meaning."""
    try:
        yield
    except (UserError, PermissionError, PeerTimeoutError, PeerFailedError) as error:
        names = re.sub(r"channel\.(\w+)", lambda match: f"--redis-{match[1].replace('_', '-')}", str(error))
        sys.exit(f"error: {one_line(names.replace('--redis-address', '--redis'), limit=2000)}")


def local_address(folder: Path) -> RedisAddress | None:
    """Of the Redis that a run started in `folder`, its channel.path; None where it has none."""
    try:
        return RedisAddress(address=(folder / ADDRESS).read_text(), password=(folder / SECRET).read_text())
    except FileNotFoundError:
        return None


def runs_at(where: RedisAddress) -> list[str]:
    """Ids of all runs there."""
    server, cursor, found = RedisServer(where, "", patience_s=PATIENCE_S), b"0", set[str]()
    while True:
        cursor, names = server.ask("SCAN", cursor, "MATCH", f"{PREFIX}:*", "COUNT", 1000)
        found |= {match[1] for name in names if (match := _KEY.fullmatch(name.decode()))}
        if cursor == b"0":
            return sorted(found)


def open_run(where: RedisAddress, run: str) -> RedisServer:
    """The run of this name or id. Raises UserError where there is none; lists those that are there."""
    ids = runs_at(where)
    if run_id(run) not in ids:
        raise UserError(
            f"no run {run} in Redis at {where.address}: it completed and left nothing, or has not begun; there are "
            f"{', '.join(ids) or 'none'}"
        )
    return RedisServer(where, run_id(run), patience_s=PATIENCE_S)


def open_local_run(where: RedisAddress, folder: Path) -> RedisServer:
    """The run that started this Redis. Raises UserError where the Redis is not running."""
    names = {folder.absolute().name, folder.absolute().parent.name}
    try:
        ids = runs_at(where)
    except UserError as error:
        raise UserError(
            f"the Redis of this run, {where.address}, is not running: the run was killed; resume it with ckpt_path=last, "
            f"or delete {folder}"
        ) from error
    return RedisServer(where, next((each for each in ids if each in names), (*ids, "")[0]), patience_s=PATIENCE_S)
