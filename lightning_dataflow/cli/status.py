"""The `status` command: a run as seen from outside, from its ledger."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from lightning_dataflow.cli.redis_runs import (
    add_arguments,
    address,
    errors_in_one_line,
    local_address,
    open_local_run,
    open_run,
    runs_at,
)
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import printable
from lightning_dataflow.control import MetadataStore, RedisMetadataStore, SqliteMetadataStore
from lightning_dataflow.control.heartbeat import FRESH_S
from lightning_dataflow.control.plane import LEDGER


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the ledger of a run says; changes nothing."""
    parser = argparse.ArgumentParser(prog="lightning-dataflow status", description=__doc__)
    parser.add_argument("run", nargs="?", help="folder of the run, runs/NAME, or its channel.path; with --redis its name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds over which rates are measured")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.run is None and options.address is None:
        parser.error("say which run: its folder, or --redis HOST:PORT and its name")
    with errors_in_one_line():
        if options.run is None:
            return print(printable("\n".join(runs_at(address(options)))))
        status = measure(open_ledger(options), options.interval)
    text = orjson.dumps(status, option=orjson.OPT_INDENT_2).decode() if options.json else "\n".join(describe(status))
    print(printable(text))


def open_ledger(options: argparse.Namespace) -> MetadataStore:
    """The ledger of a run. Raises UserError where there is none."""
    if options.address is not None:
        return RedisMetadataStore(open_run(address(options), options.run))
    run = Path(options.run)
    for folder in (run, run / "control"):
        if (folder / LEDGER).is_file():
            return SqliteMetadataStore(folder / LEDGER)
        if (where := local_address(folder)) is not None:
            return RedisMetadataStore(open_local_run(where, run))
    if (run / "result.json").is_file():
        raise UserError(f"{run} has ended and left nothing to watch: its result is in {run / 'result.json'}")
    raise UserError(
        f"no ledger in {run} or {run}/control: give the folder of a disaggregated run that has started (other topologies "
        "keep theirs in memory, and print their progress)"
    )


def measure(store: MetadataStore, interval_s: float) -> dict[str, Any]:
    """The ledger's status, and rates per second over `interval_s`. Closes it."""
    try:
        before, start = store.status(), time.monotonic()
        time.sleep(interval_s)
        after, elapsed = store.status(), max(time.monotonic() - start, 1e-9)
    finally:
        store.close()
    counts = {"published_per_s": "published", "trained_per_s": "trained_seq"}
    return after | {rate: (after[count] - before[count]) / elapsed for rate, count in counts.items()}


def describe(status: dict[str, Any]) -> list[str]:
    """A table."""
    plan = status["plan"]
    if plan is None:
        return ["not begun: no trainer has said what it needs", *_parts(status)]
    total = plan["stop"] - plan["start"]
    rows = {
        "state": status["finished"] or _running(status),
        "prompts": f"{total} from seq {plan['start']}, {plan['window']} a step",
        "leased": f"{status['leased']} being captured, {status['wanted_again']} to be captured again",
        "published": f"{status['published']} ({status['recaptured']} of them again), {status['given_up']} given up",
        "trained": f"up to seq {status['trained_seq']}, step {status['trained_step']}",
        "durable": f"up to seq {status['durable_seq']}, step {status['durable_step']}",
        "in flight": f"{status['refs_in_flight']} refs, {status['bytes_in_flight'] / 1e6:.1f} MB; of them "
        f"{status['kept_refs']} refs, {status['kept_bytes'] / 1e6:.1f} MB are trained and kept until a checkpoint",
        "rates": f"{status['published_per_s']:.1f} published/s, {status['trained_per_s']:.1f} trained/s",
        "waits": f"capture for the trainer {status['capture_waits']} times, the trainer for capture "
        f"{status['train_waits']} times" + ("; capture waits now" if status["paused"] else ""),
    }
    return [f"{name:12}{value}" for name, value in rows.items()] + _parts(status)


def _running(status: dict[str, Any]) -> str:
    if all(part["seen_s_ago"] >= FRESH_S for part in status["parts"]):
        return "not ended, but none of its parts is seen any more: resume it with ckpt_path=last"
    return "running"


def _parts(status: dict[str, Any]) -> list[str]:
    return [f"{part['name']} (pid {part['pid']} on {part['host']}, {_seen(part)}" for part in status["parts"]]


def _seen(part: dict[str, Any]) -> str:
    """When a process was seen last, and its state then."""
    if part["seen_s_ago"] < FRESH_S:
        return f"seen {part['seen_s_ago']:.0f} s ago): {part['state']}"
    return f"not seen for {part['seen_s_ago']:.0f} s), at last: {part['state']}"
