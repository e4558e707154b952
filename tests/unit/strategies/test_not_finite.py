"""A step with NaN or infinity changes nothing but counts; several in a row end a fit."""

import json
import math

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_dataflow import DataFlowTrainer
from lightning_dataflow.contracts import UserError
from lightning_dataflow.data.datamodule import BAD_STEP
from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.strategies.optimisation import gradient_norm
from tests.unit.strategies.not_finite import SPOILS, InfiniteGradient, Module, status

pytestmark = pytest.mark.integration  # each test trains


class OneBadStep(InfiniteGradient):
    bad_steps = (2,)


class OneBadFusedStep(OneBadStep):
    """With the optimizer that a GPU would have."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["fused"] = True
        return configured


class OneBadStepOfSGD(OneBadStep):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


class BrokenStore(MemoryFeatureStore):
    """The n-th sample that is read has an infinity: features went bad on the way."""

    def __init__(self, number):
        super().__init__()
        self.number, self.count = number, 0

    def get(self, ref):
        tensors, handle = super().get(ref)
        self.count += 1
        if self.count == self.number:
            tensors["last_hidden_state"] = tensors["last_hidden_state"].clone()
            tensors["last_hidden_state"][0, 5] = math.inf
        return tensors, handle


def moments(optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


@pytest.mark.parametrize(
    ("cls", "broken", "reason"),
    [
        (OneBadStep, None, "the gradient's norm is NaN or infinity"),
        (OneBadFusedStep, None, "the gradient's norm is NaN or infinity"),
        (OneBadStepOfSGD, None, "the gradient's norm is NaN or infinity"),
        (Module, 4, "last_hidden_state of sample NAME"),
    ],
)
def test_a_bad_step_changes_nothing_but_counts(fit, tmp_path, prompts, target, caplog, cls, broken, reason):
    store = None if broken is None else BrokenStore(broken)
    error, module, trainer = fit(cls, store=store)
    assert error is None
    before, optimizer = module.before, trainer.optimizers[0]
    assert all(map(torch.equal, before[1], before[2])), "the bad step is the second"
    assert not all(map(torch.equal, before[0], before[1])) and not all(map(torch.equal, before[2], before[3]))
    assert all(tensor.isfinite().all() for tensor in moments(optimizer))
    assert {int(state["step"]) for state in optimizer.state.values() if "step" in state} in ({3}, set())
    assert trainer.global_step == len(module.step_losses) == 4
    names = [
        prompts[0][index].source_id for index in map(lambda seq: trainer.datamodule.source.order.locate(seq)[0], (2, 3))
    ]
    (warning,) = [record.getMessage() for record in caplog.records if "changed nothing" in record.getMessage()]
    assert f"step 2, of samples {names[0]}, {names[1]} (seq 2 to 3), changed nothing: " in warning
    assert reason.replace("NAME", names[1]) in warning and "\n" not in warning
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "completed"
    assert (result["samples_trained"], result["samples_skipped"]) == (6, 2)
    assert result["seqs_skipped_while_training"] == [2, 3]
    assert result["samples_skipped_by_reason"] == {BAD_STEP: 2}


@pytest.mark.parametrize(("max_bad_steps", "step"), [(1, 2), (3, 4)])
def test_bad_steps_in_a_row_end_the_fit(fit, tmp_path, max_bad_steps, step):
    error, _, trainer = fit(callbacks=[], max_steps=8, max_bad_steps=max_bad_steps, **SPOILS)
    assert str(error).startswith(f"step {step}, of samples ")
    assert "the loss is NaN or infinity: start again with a lower optimizer.lr" in str(error)
    assert (f"; 3 bad steps in a row (trainer.max_bad_steps={max_bad_steps})" in str(error)) == (max_bad_steps == 3)
    assert trainer.global_step == step
    assert status(tmp_path) == f"failed: {error}"


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_a_limit_is_a_number_of_steps(value):
    with pytest.raises(UserError, match=f"max_bad_steps={value} is no number of steps: give 1"):
        DataFlowTrainer(max_bad_steps=value)


def test_a_resumed_fit_knows_of_bad_steps(fit, tmp_path):
    """Their samples stay skipped, and those that the checkpoint ends with count."""
    error, _, trainer = fit(InfiniteGradient, max_steps=3)
    assert error is None
    skipped = trainer.datamodule.skipped()
    assert sorted(skipped) == [2, 3, 4, 5]
    error, _, trainer = fit(InfiniteGradient, max_steps=8, ckpt_path=tmp_path / "checkpoints" / "step=3.ckpt")
    assert str(error).startswith("step 4, of samples ")
    assert sorted(trainer.datamodule.skipped()) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_large_half_precision_gradients_is_finite(dtype):
    weight = torch.nn.Parameter(torch.zeros(1_000_000, dtype=dtype))
    weight.grad = torch.full_like(weight, 100)
    assert gradient_norm([weight]).item() == pytest.approx(1e5, rel=1e-3)


def test_steps_that_a_grad_scaler_skips_are_no_error(fit, tmp_path):
    """Its first scales overflow; it halves them until one fits."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    error, _, trainer = fit(callbacks=[], max_steps=2, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert error is None
    assert scaler.get_scale() < 2.0**127, "no step overflowed"
    assert trainer.global_step == 2
