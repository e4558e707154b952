"""Schedules of faults."""

import random
from dataclasses import dataclass

from tests.system.chaos.trial import Fault

PRODUCER = ("capture", "put", "publish", "append")
TRAINER = ("read", "optimizer step", "ack", "checkpoint")
STORE = ("mooncake_master", "mooncake_client")
STOPS = (1, 5, 60)
"""Seconds. After a minute, every peer has given up whoever stood still."""
REDIS = ("channel=redis", "control=redis")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Faults, in no order: each comes when its moment does."""

    faults: list[Fault]
    settings: list[str]
    own_services: bool


def random_schedule(dice: random.Random, *, redis: bool = False) -> Schedule:
    """One to three faults over all parts, moments and actions.

    Args:
        redis: log and ledger are in a Redis, of which there are faults too.
    """
    num_producers = dice.choice((1, 1, 2))
    own_services = dice.random() < 0.3
    faults = [random_fault(dice, num_producers, own_services, redis) for _ in range(dice.choice((1, 1, 2, 3)))]
    settings = [
        f"topology.num_producers={num_producers}",
        f"topology.release_at={dice.choice(('durable', 'applied'))}",
        f"topology.restarts={dice.choice((0, 0, 4))}",
        *REDIS * redis,
    ]
    return Schedule(faults=faults, settings=settings, own_services=own_services)


def random_fault(dice: random.Random, num_producers: int, own_services: bool, redis: bool) -> Fault:
    """One fault. Services of the trial's own are not killed: nobody would start them again."""
    of_trainer = dice.random() < 0.5
    part = "trainer" if of_trainer else f"producer-{dice.randrange(num_producers)}"
    moments = TRAINER if of_trainer else tuple("commit" if redis and one == "append" else one for one in PRODUCER)
    moment = f"{dice.choice(('before', 'after'))} {dice.choice(moments)}"
    fault = {"part": part, "moment": moment, "action": "kill", "count": _count(dice, moment)}
    kind = dice.random()
    if of_trainer and kind < 0.15:
        return fault | {"moment": "half a checkpoint", "count": 1}
    if kind < 0.3:
        return fault | {"action": "stop", "seconds": dice.choice(STOPS)}
    if kind < (0.55 if redis else 0.45):
        services = (*STORE, *["redis-server"] * (3 * redis))
        victims = ("supervisor",) if own_services else ("supervisor", *services)
        cut_off = {"action": "stop", "seconds": dice.choice(STOPS)} if dice.random() < 0.4 else {}
        return fault | {"victim": dice.choice(victims)} | cut_off
    if kind < (0.62 if redis else 0.52):
        return fault | {"action": "start a twin of"}
    if kind < 0.75 and moment in ("before append", "before checkpoint"):
        return fault | {"action": "disk full"}
    if redis and kind < 0.82:
        return fault | _lost_reply(dice, of_trainer)
    return fault


def _lost_reply(dice: random.Random, of_trainer: bool) -> Fault:
    """Of a change in the ledger: was it made?"""
    return {
        "moment": f"before {'ledger ack' if of_trainer else 'commit'}",
        "action": "lose the reply of",
        "count": dice.randint(1, 7),
    }


def _count(dice: random.Random, moment: str) -> int:
    """Which time: a producer passes each of its moments 64 times, a trainer's step comes 8 times, a checkpoint 4."""
    most = {"capture": 40, "put": 40, "publish": 40, "append": 40, "commit": 40, "read": 7, "checkpoint": 3}
    return dice.randint(1, most.get(moment.split()[-1], 7))
