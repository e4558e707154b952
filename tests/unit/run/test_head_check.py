"""A run compares the target's head with its logits before it trains, whatever engine captures."""

from dataclasses import replace

import pytest
import torch

from lightning_dataflow.contracts import CapacityError, UserError
from lightning_dataflow.strategies.common.head_check import check_served_head
from lightning_dataflow.targets import HFTargetEngine
from lightning_dataflow.targets.logits import LogitsTransform
from tests.targets import write_target


class Served:
    """Stands for servers that give log-probabilities, or do not."""

    def __init__(self, engine, logprobs=True):
        self.info, self.engine, self.logprobs = engine.info, engine, logprobs

    def logprobs_of(self, ids):
        last, logits = self.engine.logits_of(ids)
        logprobs = logits.float().log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])
        return last, logprobs.squeeze(-1).tolist() if self.logprobs else None


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    def make(name, dtype="float32", **options):
        path = write_target(name, tmp_path_factory.mktemp(name))
        return Served(HFTargetEngine(path, layer_ids=[1], dtype=dtype, device="cpu"), **options)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "gemma2", "granite", "phi"])
def test_log_probabilities_of_a_server(served, name, dtype):
    engine = served(name, dtype)
    check_served_head(engine)
    engine.info = replace(engine.info, logits=LogitsTransform(scale=0.7 * engine.info.logits.scale))
    with pytest.raises(UserError, match=r"its log-probabilities differ by up to [\d.]+ from those of the head") as raised:
        check_served_head(engine)
    assert "\n" not in str(raised.value)


def test_a_server_without_log_probabilities_is_said(served, caplog):
    check_served_head(served("plain", logprobs=False))
    assert "its head was not compared with its logits" in caplog.text


def test_a_full_store_does_not_stop_a_run_that_resumes(served, monkeypatch):
    engine = served("plain")

    def full(ids):
        raise CapacityError("full")

    monkeypatch.setattr(engine, "logprobs_of", full)
    check_served_head(engine)
