"""One trial: a run with faults, started again until it ends well, and what must be true then."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.services.redis import LocalRedis
from tests.processes import TRAIN, environment, processes_in, wait_until

Fault = Mapping[str, Any]
RUN = "chaos"
STEPS, WINDOW = 8, 8
SETTINGS = (
    "experiment=tiny", "topology=disagg_online", "logger=none", "callbacks=no_evaluation", f"run_name={RUN}",
    "imports=[tests.system.chaos.faults]", "callbacks.checkpoint.every_n_train_steps=2",
    "topology.lease_s=3", "topology.idle_timeout_s=150", "topology.start_timeout_s=150",
)  # fmt: skip
MAX_STARTS = 5
RUN_TIMEOUT_S = 480
END_TIMEOUT_S = 15
REFUSED = "error: runs/chaos is in use by process "


@dataclass
class Outcome:
    """What a trial left.

    Attributes:
        losses: of every optimizer step.
        weights: of the draft after the last.
        samples: by optimizer step, of the surviving weights.
        starts: how often the command was started.
        errors: how the earlier ones ended, one line each.
        wrong: what is not as it must be.
    """

    losses: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: dict[int, list[str]] = field(default_factory=dict)
    starts: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_trial(
    folder: Path, faults: Sequence[Fault], settings: Sequence[str] = (), *, own_services: bool = False
) -> Outcome:
    """Run until it ends well, checking that every end on the way is a clean one.

    Args:
        folder: empty.
        settings: beside those of every trial.
        own_services: a Mooncake of the trial's, and a Redis where `settings` say so, which outlive the runs and must be
            empty in the end; else the run starts its own.
    """
    outcome, begun = Outcome(), time.monotonic()
    (folder / "chaos").mkdir(parents=True)
    (folder / "chaos" / "faults.json").write_text(json.dumps(list(faults)))
    work = folder / "work"
    work.mkdir()
    more, mooncake, redis = [], None, None
    if own_services:
        mooncake = LocalMooncake(capacity_bytes=64_000_000, log_dir=folder / "mooncake")
        more = [
            f"store.address={mooncake.master_address}",
            f"store.client_address={mooncake.client_address}",
            f"store.metrics_address={mooncake.metrics_address}",
        ]
        if "control=redis" in settings:
            redis = LocalRedis(folder / "redis")
            more += [f"channel.address={redis.where.address}", f"channel.secret_file={redis.secret_file}"]
    try:
        while outcome.starts < MAX_STARTS and not outcome.losses:
            _start(work, folder / "chaos", [*SETTINGS, *settings, *more], outcome)
        if not outcome.losses:
            outcome.wrong.append(f"did not end well in {MAX_STARTS} starts: {outcome.errors}")
            return outcome
        _read_outcome(work, folder / "chaos", outcome)
        _check_twins(folder / "chaos", outcome)
        if "control=redis" in settings:
            _check_redis(work, redis, outcome)
        else:
            _check_ledger(work, outcome)
        if mooncake is not None and (left := _keys(mooncake)):
            outcome.wrong.append(f"left in the store: {left[:3]}, {len(left)} in all")
    finally:
        for service in (mooncake, redis):
            if service is not None:
                service.close()
        outcome.seconds = time.monotonic() - begun
    return outcome


def compare(outcome: Outcome, undisturbed: Outcome, *, tolerance: float = 0.0) -> list[str]:
    """Ways in which a trial differs from an undisturbed run; none is as it must be.

    Args:
        tolerance: relative, of the losses.
    """
    wrong = list(outcome.wrong)
    pairs = zip(outcome.losses, undisturbed.losses, strict=False)
    if len(outcome.losses) != STEPS or any(abs(one - other) > tolerance * abs(other) for one, other in pairs):
        wrong.append(f"losses {outcome.losses}, undisturbed {undisturbed.losses}")
    if outcome.samples != undisturbed.samples:
        wrong.append(f"samples {outcome.samples}, undisturbed {undisturbed.samples}")
    names = {name for one in (outcome, undisturbed) for name in one.weights}
    differ = [
        name
        for name in names
        if name not in outcome.weights or not torch.equal(outcome.weights[name], undisturbed.weights[name])
    ]
    if differ:
        wrong.append(f"weights differ: {sorted(differ)}")
    return wrong


def _start(work: Path, chaos: Path, settings: Sequence[str], outcome: Outcome) -> None:
    outcome.starts += 1
    resume = ["ckpt_path=auto"] if outcome.starts > 1 else []
    with (chaos / f"output-{outcome.starts}.txt").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, TRAIN, *settings, *resume],
            cwd=work,
            env={**environment(), "CHAOS": str(chaos)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            outcome.wrong.append(f"start {outcome.starts} hung for {RUN_TIMEOUT_S} s")
            process.kill()
            status = process.wait()
    text = (chaos / f"output-{outcome.starts}.txt").read_text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    try:
        wait_until(lambda: not _processes(work), END_TIMEOUT_S, lambda: "")
    except AssertionError:
        outcome.wrong.append(f"start {outcome.starts} left processes: {list(_processes(work).values())}")
        for pid in _processes(work):
            os.kill(pid, 9)
    if status == 0:
        result = json.loads((work / "runs" / RUN / "result.json").read_text())
        outcome.losses = result["losses"]
        if (result["status"], result["samples_trained"]) != ("completed", STEPS * WINDOW):
            outcome.wrong.append(f"{result['status']} with {result['samples_trained']} samples")
        return
    outcome.errors.append(errors[-1] if errors else f"status {status}")
    if status > 0 and len(errors) != 1:
        outcome.wrong.append(f"start {outcome.starts} ended with status {status} and {len(errors)} error lines")


def _read_outcome(work: Path, chaos: Path, outcome: Outcome) -> None:
    run = work / "runs" / RUN
    checkpoint = run / "checkpoints" / f"step-{STEPS:06d}.ckpt"
    if checkpoint.is_file():  # a sharded one is a folder
        outcome.weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    of_ranks: dict[str, dict[int, list[str]]] = {}
    for path in sorted(chaos.glob("journal-*.jsonl")):  # later starts train again what is not in the weights
        seen: dict[int, list[str]] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            seen.setdefault(record["step"], []).extend(name.partition(":")[2] for name in record["samples"])
        of_ranks.setdefault(path.stem.rpartition("-")[2], {}).update(seen)
    for _, of_rank in sorted(of_ranks.items()):
        for step, samples in of_rank.items():
            outcome.samples.setdefault(step, []).extend(samples)
    for step, samples in outcome.samples.items():
        if len(samples) != WINDOW:
            outcome.wrong.append(f"step {step} trained {len(samples)} samples")
    trained = [name for samples in outcome.samples.values() for name in samples]
    if len(set(trained)) != STEPS * WINDOW:
        outcome.wrong.append(f"{len(set(trained))} of {STEPS * WINDOW} samples were trained")


def _check_twins(chaos: Path, outcome: Outcome) -> None:
    """A twin that was started while the run was going on has printed one line."""
    for path in chaos.glob("twin-*.txt"):
        lines = path.read_text().splitlines()
        if len(lines) != 1 or not lines[0].startswith(REFUSED):
            outcome.wrong.append(f"a twin printed {lines[-3:]}")


def _processes(work: Path) -> dict[int, str]:
    """Of a run; its Redis works in its own folder."""
    return processes_in(work) | processes_in(work / "runs" / RUN / "control")


def _check_redis(work: Path, own: LocalRedis | None, outcome: Outcome) -> None:
    """A completed run leaves nothing there, or what Redis removes in an hour, where one of its processes was killed."""
    left = {path.name for path in (work / "runs" / RUN / "control").glob("*")} - {"redis.log", "redis-lock"}
    if left:
        outcome.wrong.append(f"left of the run's Redis: {left}")
    if own is not None:
        server = RedisServer(own.where, RUN)
        for key in server.ask("KEYS", "*"):
            if server.ask("TTL", key) < 0:
                outcome.wrong.append(f"left in Redis: {key.decode()}")
        server.leave()


def _check_ledger(work: Path, outcome: Outcome) -> None:
    run = work / "runs" / RUN
    shown = subprocess.run(
        [sys.executable, "-m", "lightning_dataflow", "status", str(run), "--json", "--interval=0.1"],
        cwd=work, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    ledger = json.loads(shown.stdout)
    for name in ("refs_in_flight", "bytes_in_flight", "leased"):
        if ledger[name] != 0:
            outcome.wrong.append(f"the ledger says {name}={ledger[name]}")
    if (ledger["finished"], ledger["trained_seq"]) != ("completed", STEPS * WINDOW):
        outcome.wrong.append(f"the ledger says finished={ledger['finished']}, trained_seq={ledger['trained_seq']}")


def _keys(mooncake: LocalMooncake) -> list[str]:
    with urllib.request.urlopen(f"http://{mooncake.metrics_address}/get_all_keys") as answer:
        return answer.read().decode().split()
