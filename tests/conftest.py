"""Fixtures for all tests: the tiny target and its prompts, and a Redis, each made once per worker process.

What is heavy is imported where it is used, so that tests of records, control plane and settings start without torch.
"""

import gc
import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_dataflow.control.redis.server import RedisServer
    from lightning_dataflow.prompts import PromptDataset
    from lightning_dataflow.services.redis import LocalRedis
    from lightning_dataflow.targets import HFTargetEngine

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test downloads anything

LAYER_IDS = (1, 3, 4)
RUNS = itertools.count()
LONGEST = ("tests/test_lint.py", "tests/distributed/", "tests/system/", "tests/unit/cli/", "tests/unit/evaluation/")


def pytest_configure() -> None:
    """SIGTERM ends the tests as Ctrl-C does: with the processes that they have started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs only in the nightly tests, or with an engine, is slow. The longest folders come first."""
    for item in items:
        if item.get_closest_marker("nightly") or item.get_closest_marker("engine"):
            item.add_marker("slow")
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish() -> None:
    """The garbage collector need not look again at what the imports have made: a second each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lightning_dataflow.targets.tiny import write_tiny_target

    return write_tiny_target(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lightning_dataflow.targets.tiny import write_tiny_conversations

    return write_tiny_conversations(tmp_path_factory.mktemp("tiny") / "conversations.jsonl")


@pytest.fixture(scope="session")
def tokenizer(target_path: Path) -> "PreTrainedTokenizerBase":
    from lightning_dataflow.targets import load_tokenizer

    return load_tokenizer(target_path)


@pytest.fixture(scope="session")
def target(target_path: Path) -> "HFTargetEngine":
    from lightning_dataflow.targets import HFTargetEngine

    return HFTargetEngine(target_path, layer_ids=LAYER_IDS, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def prompts(conversations: Path, tokenizer: "PreTrainedTokenizerBase") -> "tuple[PromptDataset, PromptDataset]":
    from lightning_dataflow.prompts import load_prompts

    return load_prompts(str(conversations), tokenizer, max_length=128, num_eval_samples=4)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[LocalRedis]":
    """A Redis shared by all tests of this process that do not disturb it."""
    from lightning_dataflow.services.redis import LocalRedis

    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with LocalRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_run(redis_server: "LocalRedis") -> "RedisServer":
    """A run of its own in that Redis, with the id `run-N`."""
    from lightning_dataflow.control.redis.server import RedisServer

    return RedisServer(redis_server.where, f"run-{next(RUNS)}")
