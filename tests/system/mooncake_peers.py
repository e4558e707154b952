"""Processes with stores of their own in one Mooncake."""

import json
import subprocess
import sys
from typing import Any

import torch

from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.stores import MooncakeFeatureStore
from tests.processes import ROOT, environment

PEER = """
import json, os, sys, time
from dataclasses import replace
import torch
from lightning_dataflow.contracts import ref_from_json, ref_to_json
from lightning_dataflow.stores import MooncakeFeatureStore
from lightning_dataflow.services.mooncake import LocalMooncake
from tests.unit.stores.samples import origin

def put(sample_id, value, num_bytes=1 << 20, attempt=0):
    tensor = torch.full((4, num_bytes // 16), value, dtype=torch.int32)
    return ref_to_json(store.put({"x": tensor}, replace(origin(sample_id), attempt=attempt)))

def get(ref):
    return store.get(ref_from_json(ref))[0]["x"].unique().tolist()

def free_all(refs):
    for ref in refs:
        store.free(ref_from_json(ref))

for line in sys.stdin:
    try:
        answer = {"value": eval(line)} if line[0] != "!" else exec(json.loads(line[1:])) or {"value": None}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


class PeerError(Exception):
    pass


class Peer:
    """Another process with its own store."""

    def __init__(self, mooncake: LocalMooncake | None = None, store_id: str = "system", **options: Any):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        if mooncake is not None:
            self.run(f"store = MooncakeFeatureStore({store_id!r}, **{places(mooncake) | options!r})")

    def __call__(self, expression: str) -> Any:
        return self._ask(expression)

    def run(self, code: str) -> None:
        self._ask("!" + json.dumps(code))

    def start(self, code: str) -> None:
        """Run `code` without waiting for it."""
        self._tell("!" + json.dumps(code))

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _ask(self, line: str) -> Any:
        self._tell(line)
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise PeerError(f"{answer['error']}: {answer['message']}")
        return answer["value"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def places(mooncake: LocalMooncake) -> dict[str, Any]:
    return {name: getattr(mooncake, name) for name in ("master_address", "client_address", "metrics_address")}


def attach(mooncake: LocalMooncake, store_id: str = "system", **options: Any) -> MooncakeFeatureStore:
    return MooncakeFeatureStore(store_id, **places(mooncake) | options)


def sample(value: int, num_bytes: int = 1 << 20) -> dict[str, torch.Tensor]:
    return {"x": torch.full((4, num_bytes // 16), value, dtype=torch.int32)}
