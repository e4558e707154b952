"""Faults inside a part of a run, and a journal of what it trained.

A run imports this by `imports=[tests.system.chaos.faults]`; nothing in the package knows of it. The environment variable
CHAOS names a folder with `faults.json`, a list of faults of which each happens once, however often the part starts again.
"""

import errno
import functools
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_dataflow.checkpoints.files import CheckpointFiles
from lightning_dataflow.contracts import CapacityError, SampleOrigin
from lightning_dataflow.control import ControlPlane
from lightning_dataflow.control.local.log import FileChannel
from lightning_dataflow.control.redis.ledger import RedisMetadataStore
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import feeds
from lightning_dataflow.stores import MooncakeFeatureStore
from lightning_dataflow.strategies.module import DraftModule

FOLDER = Path(os.environ["CHAOS"])
MOMENTS: dict[str, dict[str, tuple[Any, str]]] = {
    "producer": {
        "capture": (feeds, "capture_prompts"),
        "put": (MooncakeFeatureStore, "put"),
        "publish": (ControlPlane, "publish"),
        "append": (FileChannel, "append"),  # inside of publish: the ledger's transaction is open
        "commit": (RedisMetadataStore, "commit"),
    },
    "trainer": {
        "read": (MooncakeFeatureStore, "get_many"),
        "optimizer step": (DraftModule, "on_before_optimizer_step"),
        "ack": (DataFlowDataModule, "mark_applied"),
        "ledger ack": (RedisMetadataStore, "ack"),
        "checkpoint": (CheckpointFiles, "save_checkpoint"),
    },
}
"""What a fault can come before or after, by the kind of part."""
_counts: dict[tuple[str, str], int] = {}
_put = MooncakeFeatureStore.put


def part_name() -> str | None:
    """The name of this process, such as `producer-0` or `trainer`; None for a supervisor."""
    role = next((one.partition("=")[2] for one in sys.argv if one.startswith("role=")), None)
    if role != "producer":
        return role
    folder = next(one for one in sys.argv if one.startswith("hydra.run.dir="))
    return Path(folder.partition("=")[2].strip("'")).name


def reached(part: str, moment: str, arguments: Sequence[Any]) -> None:
    """Run the fault that is planned for this moment, if any."""
    for index, fault in enumerate(json.loads((FOLDER / "faults.json").read_text())):
        if (fault["part"], fault["moment"]) != (part, moment):
            continue
        key = (str(index), moment)
        _counts[key] = _counts.get(key, 0) + 1
        if _counts[key] == fault["count"] and _first(index):
            _happen(fault, arguments)


def _first(index: int) -> bool:
    try:
        os.close(os.open(FOLDER / f"happened-{index}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _happen(fault: dict[str, Any], arguments: Sequence[Any]) -> None:
    victim = fault.get("victim")
    pid = os.getpid() if victim is None else _find(victim)
    if pid is None:
        return
    if fault["action"] == "kill":
        os.kill(pid, signal.SIGKILL)
    elif fault["action"] == "stop":
        waker = f"sleep {fault['seconds']}; kill -CONT {pid}"
        subprocess.Popen(["sh", "-c", waker], start_new_session=True, cwd="/")
        os.kill(pid, signal.SIGSTOP)
    elif fault["action"] == "start a twin of":
        _start_twin()
    elif fault["action"] == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fault["action"] == "store full":
        _fill(*arguments)
    elif fault["action"] == "lose the reply of":
        _lose_reply(arguments[0].server)


def _start_twin() -> None:
    """The command of this run once more. It must end with one line, and change nothing."""
    supervisor = _find("supervisor")
    if supervisor is None:
        return
    command = Path(f"/proc/{supervisor}/cmdline").read_text().split("\0")[:-1]
    name = f"twin-{time.time_ns()}.txt"
    with (FOLDER / name).open("w") as output:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def _lose_reply(server: Any) -> None:
    """The connection breaks after the server has answered the next request and before the answer arrives."""
    inner = server._send

    def send(*command: Any) -> Any:
        server._send = inner
        inner(*command)
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    server._send = send


def _fill(store: MooncakeFeatureStore, tensors: Any, origin: SampleOrigin) -> None:
    """Put samples that nobody reads until the store takes no more."""
    for number in itertools.count():
        try:
            _put(store, tensors, replace(origin, sample_id=f"{origin.sample_id}-{number}"))
        except CapacityError:
            return


def _find(victim: str) -> int | None:
    """The id of a process of this run: its working folder is this one, or that of a Redis below it."""
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or not Path(os.readlink(entry / "cwd")).is_relative_to(Path.cwd()):
                continue
            arguments = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if victim == "supervisor":
            matches = any(one.endswith("train.py") for one in arguments)
        elif victim == "redis-server":
            matches = victim in arguments[0] and entry.name != str(os.getpid())
        elif victim.startswith("mooncake"):
            matches = any(one.endswith(victim) for one in arguments[:2])
        else:
            matches = f"role={victim.partition('-')[0]}" in arguments and "train" in arguments
        if matches and "leash" not in " ".join(arguments[:3]):
            return int(entry.name)
    return None


def _wrap(owner: Any, name: str, part: str, moment: str) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        reached(part, f"before {moment}", args)
        if moment == "checkpoint" and _torn(part, args):
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        reached(part, f"after {moment}", args)
        return result

    setattr(owner, name, wrapped)


def _torn(part: str, args: Any) -> bool:
    """Write the first half of a checkpoint where the whole one belongs, if that is planned."""
    planned = json.loads((FOLDER / "faults.json").read_text())
    for index, fault in enumerate(planned):
        if (fault["part"], fault["moment"]) == (part, "half a checkpoint") and _first(index):
            _, checkpoint, path = args
            path = Path(path)
            memory = io.BytesIO()
            torch.save(checkpoint, memory)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(memory.getvalue()[: memory.tell() // 2])
            return True
    return False


def _journal() -> None:
    """Note the samples of every micro-batch, with the optimizer step that they are for."""
    inner: Callable[..., Any] = DraftModule.training_step
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    name = f"{time.time_ns()}-{rank}"

    def training_step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
        with (FOLDER / f"journal-{name}.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.trainer.global_step, "samples": batch["sample_ids"]}) + "\n")
        return inner(self, batch, batch_idx)

    DraftModule.training_step = training_step  # type: ignore[method-assign]


_part = part_name()
if _part is not None:
    for _moment, (_owner, _name) in MOMENTS[_part.partition("-")[0]].items():
        _wrap(_owner, _name, _part, _moment)
    if _part == "trainer":
        _journal()
