"""Shared parts: the tiny target and its prompts, made once per session."""

import itertools
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test downloads anything

from pathlib import Path

import pytest
import torch

from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.prompts import PromptDataset, load_prompts
from lightning_dataflow.services.redis import LocalRedis
from lightning_dataflow.targets import HFTargetEngine, load_tokenizer
from lightning_dataflow.targets.tiny import write_tiny_conversations, write_tiny_target

LAYER_IDS = (1, 3, 4)
RUNS = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_conversations(tmp_path_factory.mktemp("tiny") / "conversations.jsonl")


@pytest.fixture(scope="session")
def tokenizer(target_path: Path):
    return load_tokenizer(target_path)


@pytest.fixture(scope="session")
def target(target_path: Path) -> HFTargetEngine:
    return HFTargetEngine(target_path, layer_ids=LAYER_IDS, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def prompts(conversations: Path, tokenizer) -> tuple[PromptDataset, PromptDataset]:
    return load_prompts(str(conversations), tokenizer, max_length=128, num_eval_samples=4)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory):
    """A Redis for all tests of this process that do not harm it."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with LocalRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_run(redis_server: LocalRedis) -> RedisServer:
    """A run of its own in that Redis, with the id `run-N`."""
    return RedisServer(redis_server.where, f"run-{next(RUNS)}")
