"""Trials over three hosts: links are cut at random while two producers and a trainer run, and parts killed behind them.

`python -m tests.system.chaos.links --trials 10 --seed 0` prints a line a trial.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import TINY, TRAIN, python, result, wait_until
from tests.system.hosts import SECRET, Host, hosts, redis, start_services, steps, stored

RUN, NUM_STEPS = "links", 24
AHEAD = 2
"""Windows of 8 samples that producers may be ahead of the trainer."""
SETTINGS = (*TINY, f"trainer.max_steps={NUM_STEPS}", "callbacks.checkpoint.every_n_train_steps=2", f"run_name={RUN}")
MORE = ("topology=disagg_online", f"topology.high_refs={AHEAD * 8}", "topology.idle_timeout_s=120", "topology.lease_s=5")
START_TIMEOUT_S, END_TIMEOUT_S = 180, 240
BEGUN = "announced"
TRIES = 12
"""A trainer whose forerunner was killed is refused until that one has been silent for a lease."""


@dataclass(frozen=True)
class Cut:
    """A host is cut off.

    Attributes:
        host: its name.
        step: optimizer step from which on.
        delay_s: after that.
        seconds: until it is healed.
        kill: the parts on it are killed in the meantime, and started again once it is healed.
    """

    host: str
    step: int
    delay_s: float
    seconds: float
    kill: bool

    def __str__(self) -> str:
        killed = ", its parts killed" if self.kill else ""
        return f"{self.host} cut for {self.seconds:.1f} s at step {self.step} + {self.delay_s:.1f} s{killed}"


def random_cuts(generator: random.Random) -> list[Cut]:
    """Two to four cuts, in order of their steps."""
    cuts = []
    for step in sorted(generator.sample(range(1, NUM_STEPS - 4), generator.randint(2, 4))):
        host = generator.choice(("producer", "trainer", "services"))
        kill = host != "services" and generator.random() < 0.4
        cuts.append(Cut(host, step, generator.uniform(0, 1), generator.choice((0.5, 2, 6, 12)), kill))
    return cuts


class Trial:
    """The parts of one run on their hosts."""

    def __init__(self, producer: Host, trainer: Host, services: Host):
        self.by_name = {"producer": producer, "trainer": trainer, "services": services}
        self.producer, self.trainer, self.services = producer, trainer, services
        for host in (producer, trainer):
            (host.folder / "secret").write_text(SECRET)
        self.settings = (*SETTINGS, *MORE, *start_services(services))
        time.sleep(2)  # a part waits for a store that is about to start, but says so
        self.producing = [self._produce() for _ in range(2)]
        self.training = self._train()
        self.num_cuts = self.num_kills = 0

    def _produce(self) -> subprocess.Popen[bytes]:
        return self.producer.train(*self.settings, "role=producer")

    def _train(self, *more: str) -> subprocess.Popen[bytes]:
        return self.trainer.train(*self.settings, "role=trainer", *more)

    def shown(self) -> str:
        return f"{self.producer.shown()}\n{self.trainer.shown()}"

    def run(self, cuts: Sequence[Cut]) -> dict[str, Any]:
        """The result of the run; AssertionError for whatever is not as it must be."""
        for cut in cuts:
            self._until(lambda step=cut.step: steps(self.services, RUN) >= step or self.training.poll() is not None)
            time.sleep(cut.delay_s)
            if self.training.poll() is None:
                self._cut(cut)
        self._until(lambda: self.training.poll() is not None)
        for process in (self.training, *self.producing):
            wait_until(lambda one=process: one.poll() is not None, END_TIMEOUT_S, self.shown)
            assert process.returncode == 0, f"status {process.returncode}\n{self.shown()}"
        assert SECRET not in self.shown()
        for host in (self.producer, self.trainer):
            left = subprocess.run(["ip", "netns", "pids", host.space], capture_output=True, text=True).stdout.split()
            assert not left, f"processes left on {host.folder.name}: {left}"
        kept = [key for key in redis(self.services, "KEYS", "*").split() if int(redis(self.services, "TTL", key)) < 0]
        assert not kept, f"left in Redis: {kept}"
        assert not (left := stored(self.services)), f"left in the store: {left}"
        return result(self.trainer.folder, RUN)

    def _cut(self, cut: Cut) -> None:
        host = self.by_name[cut.host]
        self.num_cuts += 1
        host.cut()
        ends = time.monotonic() + cut.seconds
        # A producer that begins when the run is over waits for the trainer of another.
        kill = cut.kill and steps(self.services, RUN) < NUM_STEPS - AHEAD - 2
        if kill:
            for process in self.producing if cut.host == "producer" else [self.training]:
                process.send_signal(signal.SIGKILL)
                process.wait()
            self.num_kills += 1
        time.sleep(max(0.0, ends - time.monotonic()))
        host.heal()
        if kill and cut.host == "producer":
            self._produce_again()
        elif kill:
            self._train_again()

    def _produce_again(self) -> None:
        """Return once they have begun: who starts while nothing answers says so and ends, rather than wait."""
        before = self.producer.shown().count(BEGUN)
        self.producing = [self._produce() for _ in self.producing]
        wanted = before + len(self.producing)
        self._until(lambda: self.producer.shown().count(BEGUN) >= wanted or self.training.poll() is not None)

    def _train_again(self) -> None:
        for _ in range(TRIES):
            before = steps(self.services, RUN)
            self.training = self._train("ckpt_path=auto")
            self._until(lambda before=before: self.training.poll() is not None or steps(self.services, RUN) > before)
            if self.training.poll() in (None, 0):
                return
            assert "trainer" in self.trainer.shown().splitlines()[-1], self.shown()
            time.sleep(2)
        raise AssertionError(f"refused {TRIES} times\n{self.shown()}")

    def _until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, START_TIMEOUT_S, self.shown)


def undisturbed(folder: Path) -> dict[str, Any]:
    """What one process has in the end."""
    folder.mkdir(parents=True)
    python(TRAIN, *SETTINGS, "topology=online", cwd=folder)
    return result(folder, RUN)


def run_trial(folder: Path, cuts: Sequence[Cut], expected: dict[str, Any]) -> tuple[int, int]:
    """Run one; returns how many cuts and kills fell within training. AssertionError says what went wrong."""
    with hosts(folder, ("producer", "trainer", "services")) as (producer, trainer, services):
        trial = Trial(producer, trainer, services)
        actual = trial.run(cuts)
    for name in ("losses", "samples_trained"):
        assert actual[name] == expected[name], f"{name} {actual[name]}, undisturbed {expected[name]}"
    return trial.num_cuts, trial.num_kills


def main() -> int:
    """The exit status is the number of trials that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="no new trial starts after this long")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="links-"))
    expected = undisturbed(folder / "undisturbed")
    deadline, num_wrong, num_trials = time.monotonic() + 60 * arguments.minutes, 0, 0
    for number in range(arguments.seed, arguments.seed + arguments.trials):
        if time.monotonic() > deadline:
            break
        begun, cuts = time.monotonic(), random_cuts(random.Random(number))
        num_trials += 1
        try:
            num_cuts, num_kills = run_trial(folder / str(number), cuts, expected)
            verdict = f"ok, {num_cuts} cuts, {num_kills} kills"
        except AssertionError as error:
            num_wrong += 1
            verdict = f"WRONG: {error}"
        print(f"trial {number}, {time.monotonic() - begun:.0f} s: {'; '.join(map(str, cuts))}\n    {verdict}", flush=True)
    print(f"{num_trials - num_wrong} of {num_trials} trials have the losses of one process to the bit")
    if not num_wrong:
        shutil.rmtree(folder)
    return num_wrong


if __name__ == "__main__":
    sys.exit(main())
