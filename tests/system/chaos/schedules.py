"""Schedules of faults."""

import random
from dataclasses import dataclass

from tests.system.chaos.trial import Fault

PRODUCER = ("capture", "put", "publish", "append")
TRAINER = ("read", "optimizer step", "ack", "checkpoint")
STORE = ("mooncake_master", "mooncake_client")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Faults, in no order: each comes when its moment does."""

    faults: list[Fault]
    settings: list[str]
    own_mooncake: bool


def random_schedule(dice: random.Random) -> Schedule:
    """One to three faults over all parts, moments and actions."""
    num_producers = dice.choice((1, 1, 2))
    own_mooncake = dice.random() < 0.3
    faults = [random_fault(dice, num_producers, own_mooncake) for _ in range(dice.choice((1, 1, 2, 3)))]
    settings = [
        f"topology.num_producers={num_producers}",
        f"topology.release_at={dice.choice(('durable', 'applied'))}",
        f"topology.restarts={dice.choice((0, 0, 4))}",
    ]
    return Schedule(faults=faults, settings=settings, own_mooncake=own_mooncake)


def random_fault(dice: random.Random, num_producers: int, own_mooncake: bool) -> Fault:
    """One fault. A Mooncake of the trial's own is not killed: nobody would start it again."""
    of_trainer = dice.random() < 0.5
    part = "trainer" if of_trainer else f"producer-{dice.randrange(num_producers)}"
    moment = f"{dice.choice(('before', 'after'))} {dice.choice(TRAINER if of_trainer else PRODUCER)}"
    fault = {"part": part, "moment": moment, "action": "kill", "count": _count(dice, moment)}
    kind = dice.random()
    if of_trainer and kind < 0.15:
        return fault | {"moment": "half a checkpoint", "count": 1}
    if kind < 0.3:
        return fault | {"action": "stop", "seconds": dice.choice((1, 5))}
    if kind < 0.45:
        victims = ("supervisor",) if own_mooncake else ("supervisor", *STORE)
        cut_off = {"action": "stop", "seconds": dice.choice((1, 5))} if dice.random() < 0.4 else {}
        return fault | {"victim": dice.choice(victims)} | cut_off
    if kind < 0.55 and moment in ("before append", "before checkpoint"):
        return fault | {"action": "disk full"}
    return fault


def _count(dice: random.Random, moment: str) -> int:
    """Which time: a producer passes each of its moments 64 times, a trainer's step comes 8 times, a checkpoint 4."""
    most = {"capture": 40, "put": 40, "publish": 40, "append": 40, "read": 7, "checkpoint": 3}.get(moment.split()[-1], 7)
    return dice.randint(1, most)
