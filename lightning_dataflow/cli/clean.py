"""The `clean` command: remove from Redis what an abandoned run left there."""

import argparse
from collections.abc import Sequence

from lightning_dataflow.cli.redis_runs import add_arguments, address, errors_in_one_line, open_run
from lightning_dataflow.contracts import UserError
from lightning_dataflow.control import RedisMetadataStore
from lightning_dataflow.control.heartbeat import FRESH_S


def main(arguments: Sequence[str] | None = None) -> None:
    """Remove a run's keys from a Redis, unless one of its processes is alive."""
    parser = argparse.ArgumentParser(prog="lightning-dataflow clean", description=__doc__)
    parser.add_argument("run", help="name of the run; `lightning-dataflow status --redis HOST:PORT` lists them")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.address is None:
        parser.error("--redis HOST:PORT is missing; a run with a Redis of its own has all in its folder: delete the folder")
    with errors_in_one_line():
        print(clean(options))


def clean(options: argparse.Namespace) -> str:
    """Remove the run; returns what was removed. Raises UserError while it is alive."""
    server = open_run(address(options), options.run)
    status = RedisMetadataStore(server).status()
    for part in sorted(status["parts"], key=lambda part: part["seen_s_ago"]):
        if part["seen_s_ago"] < FRESH_S and not status["finished"]:
            raise UserError(
                f"run {options.run} is alive: {part['name']} on {part['host']} was seen {part['seen_s_ago']:.0f} s ago "
                f"({part['state']}); end it first, and wait {FRESH_S:.0f} s"
            )
    sizes = [server.ask("MEMORY", "USAGE", key, "SAMPLES", 0) for key in server.keys]
    num_keys = server.ask("DEL", *server.keys)
    return f"removed run {options.run}: {num_keys} keys, {sum(size or 0 for size in sizes) / 1e6:.1f} MB"
