"""Random trials."""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.system.chaos.schedules import Schedule, random_schedule
from tests.system.chaos.trial import compare, run_trial


def main() -> int:
    """Print a line a trial; the exit status is the number of trials that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="no new trial starts after this long")
    parser.add_argument("--redis", action="store_true", help="log and ledger in a Redis, with faults of its own")
    parser.add_argument("--keep", action="store_true", help="keep the folders of trials that went wrong")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    undisturbed = run_trial(folder / "undisturbed", [])
    assert not undisturbed.wrong, undisturbed.wrong
    deadline, num_wrong, num_trials = time.monotonic() + 60 * arguments.minutes, 0, 0
    for number in range(arguments.seed, arguments.seed + arguments.trials):
        if time.monotonic() > deadline:
            break
        schedule = random_schedule(random.Random(number), redis=arguments.redis)
        outcome = run_trial(folder / str(number), schedule.faults, schedule.settings, own_services=schedule.own_services)
        wrong = compare(outcome, undisturbed)
        num_trials += 1
        num_wrong += bool(wrong)
        happened = len(list((folder / str(number) / "chaos").glob("happened-*")))
        verdict = "WRONG" if wrong else "ok"
        print(f"trial {number}: {verdict}, {outcome.seconds:.0f} s, {outcome.starts} starts, {happened} faults", flush=True)
        print(f"    {_shown(schedule)}", flush=True)
        for one in [*wrong, *(f"(ended with {error})" for error in outcome.errors)]:
            print(f"    {one}", flush=True)
        if not (wrong and arguments.keep):
            shutil.rmtree(folder / str(number))
    print(f"{num_trials - num_wrong} of {num_trials} trials equal the undisturbed run to the bit")
    if not arguments.keep:
        shutil.rmtree(folder)
    return num_wrong


def _shown(schedule: Schedule) -> str:
    faults = [
        f"{one['action']} {one.get('victim', one['part'])} at {one['part']}'s {one['count']}. '{one['moment']}'"
        for one in schedule.faults
    ]
    return "; ".join([*faults, *schedule.settings, *["services of its own"] * schedule.own_services])


sys.exit(main())
