"""A step with NaN or infinity changes nothing, several in a row end a fit, and no checkpoint holds spoiled weights."""

import json
import math
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file, save_file

from lightning_dataflow import DataFlowTrainer, Eagle3Module, latest_checkpoint
from lightning_dataflow.checkpoints.markers import mark_complete
from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.data.datamodule import BAD_STEP
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.strategies.optimisation import gradient_norm
from tests.unit.strategies.fits import make_trainer

SPOILS = {"lr": 1e20, "warmup_ratio": 0.0}


class Module(Eagle3Module):
    """Keeps the weights that each window began with, by the number of steps before it."""

    def on_train_start(self):
        super().on_train_start()
        self.before = {}

    def training_step(self, batch, batch_idx):
        self.before[self.trainer.global_step] = [parameter.detach().clone() for parameter in self.parameters()]
        return super().training_step(batch, batch_idx)


class InfiniteGradient(Module):
    """Of one weight, from the second step on; the loss stays finite."""

    bad_steps = range(2, 100)

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step + 1 in self.bad_steps:
            self.draft.fc.weight.grad[0, 0] = math.inf
        super().on_before_optimizer_step(optimizer)


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


class NothingButBadSteps(InfiniteGradient):
    bad_steps = range(100)


class Spoiled(Module):
    """The second step makes a weight infinite."""

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        if len(self.step_losses) == 2:
            with torch.no_grad():
                self.draft.fc.weight[0, 0] = math.inf


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


@pytest.fixture
def fit(tmp_path, target_path, prompts, target):
    """fit(cls, …) → (error, module, trainer); a checkpoint after every step, unless `callbacks` are given."""

    def call(
        cls=Module,
        *,
        max_steps=4,
        store=None,
        callbacks=None,
        trainer_cls=DataFlowTrainer,
        plugins=None,
        ckpt_path=None,
        max_bad_steps=3,
        **options,
    ):
        callbacks = [saves(tmp_path)] if callbacks is None else callbacks
        module = cls(str(target_path), **{"draft_vocab_size": 64, "num_steps": 2, "lr": 1e-3} | options)
        data = DataFlowDataModule(OnlineSource(prompts[0], target, store), global_batch_size=2, micro_batch_size=1)
        options = {"callbacks": callbacks, "enable_checkpointing": bool(callbacks), "plugins": plugins or []}
        if trainer_cls is DataFlowTrainer:
            options["max_bad_steps"] = max_bad_steps
        trainer = make_trainer(tmp_path, data, max_steps, trainer_cls, **options)
        try:
            trainer.fit(module, data, ckpt_path=ckpt_path)
        except NotFiniteError as error:
            return error, module, trainer
        return None, module, trainer

    return call


def saves(folder, **options) -> ModelCheckpoint:
    settings = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_exception": True, "save_last": True} | options
    return ModelCheckpoint(folder / "checkpoints", filename="{step}", **settings)


def written(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.ckpt"))


def status(folder) -> str:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((folder / "result.json").read_text(), parse_constant=refuse)["status"]


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
    assert (f"; 3 steps in a row were such (trainer.max_bad_steps={max_bad_steps})" in str(error)) == (max_bad_steps == 3)
    assert trainer.global_step == step
    assert status(tmp_path) == f"failed: {error}"


def test_without_a_limit_the_last_weights_are_tried(fit, tmp_path):
    error, *_ = fit(callbacks=[], max_steps=6, max_bad_steps=None, **SPOILS)
    assert str(error).startswith("step 6, of samples ")
    assert "the loss through the draft's weights after it is NaN or infinity, so they are not saved" in str(error)


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_a_limit_is_a_number_of_steps(value):
    with pytest.raises(UserError, match=f"max_bad_steps={value} is no number of steps: give 1"):
        DataFlowTrainer(max_bad_steps=value)


@pytest.mark.parametrize("trainer_cls", [DataFlowTrainer, L.Trainer])
def test_finite_weights_that_give_no_finite_loss_are_not_saved(fit, tmp_path, trainer_cls):
    error, *_ = fit(trainer_cls=trainer_cls, **SPOILS)
    assert str(error).startswith("step 1, of samples ")
    assert "the loss through the draft's weights after it is NaN or infinity" in str(error)
    assert written(tmp_path) == []


def test_nothing_is_saved_before_a_step_was_good(fit, tmp_path):
    with pytest.warns(UserWarning, match=r"step=1.ckpt is not written: no step has changed the draft"):
        error, *_ = fit(NothingButBadSteps, max_steps=8)
    assert str(error).startswith("step 3, of samples ")
    assert written(tmp_path) == []


def test_a_resumed_fit_knows_of_bad_steps(fit, tmp_path):
    """Their samples stay skipped, and those that the checkpoint ends with count."""
    error, _, trainer = fit(InfiniteGradient, max_steps=3)
    assert error is None
    skipped = trainer.datamodule.skipped()
    assert sorted(skipped) == [2, 3, 4, 5]
    error, _, trainer = fit(InfiniteGradient, max_steps=8, ckpt_path=tmp_path / "checkpoints" / "step=3.ckpt")
    assert str(error).startswith("step 4, of samples ")
    assert sorted(trainer.datamodule.skipped()) == [2, 3, 4, 5, 6, 7]


def test_trying_weights_draws_no_random_numbers(fit, tmp_path):
    class Draws(Module):
        def objective(self, batch, context):
            torch.rand(1)
            return super().objective(batch, context)

    states = []
    for callbacks in ([], None):
        torch.manual_seed(0)
        fit(Draws, callbacks=callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("trainer_cls", [DataFlowTrainer, L.Trainer])
def test_no_model_checkpoint_saves_what_an_exception_ends(fit, tmp_path, trainer_cls):
    callback = saves(tmp_path, every_n_train_steps=100)
    error, *_ = fit(InfiniteGradient, max_steps=8, callbacks=[callback], trainer_cls=trainer_cls)
    assert error is not None
    assert written(tmp_path) == []


@pytest.mark.parametrize("trainer_cls", [DataFlowTrainer, L.Trainer])
def test_nothing_else_saves_through_the_trainer(fit, tmp_path, trainer_cls):
    callbacks = [OnExceptionCheckpoint(tmp_path)]
    error, *_ = fit(InfiniteGradient, max_steps=8, callbacks=callbacks, trainer_cls=trainer_cls)
    assert error is not None
    assert written(tmp_path) == []


@pytest.mark.parametrize("trainer_cls", [DataFlowTrainer, L.Trainer])
def test_weights_that_are_not_finite_are_not_saved(fit, tmp_path, trainer_cls):
    """Also where the loss of the step that made them so is finite."""
    error, *_ = fit(Spoiled, trainer_cls=trainer_cls)
    assert "the draft's weights hold NaN or infinity (fc.weight), so they are not saved" in str(error)
    assert str(error).startswith("step 2, of samples ")
    assert written(tmp_path) == ["last.ckpt", "step=1.ckpt"]
    for name in ("last", "step=1"):
        saved = torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert saved["global_step"] == 1


def test_an_older_checkpoint_of_the_same_name_stays_complete(fit, tmp_path):
    callback = saves(tmp_path, save_last=False, save_top_k=1, enable_version_counter=False)
    callback.filename = "newest"
    error, *_ = fit(Spoiled, callbacks=[callback])
    assert "are not saved" in str(error)
    newest = tmp_path / "checkpoints" / "newest.ckpt"
    assert latest_checkpoint(tmp_path / "checkpoints") == newest
    assert torch.load(newest, weights_only=True)["global_step"] == 1


def test_the_last_step_counts_too(fit, tmp_path):
    """No loss and no checkpoint comes after it."""
    error, *_ = fit(Spoiled, max_steps=2, callbacks=[])
    assert "fc.weight" in str(error)
    assert status(tmp_path) == f"failed: {error}"


def test_a_fit_after_a_failed_one_saves_as_ever(fit, tmp_path):
    """Also inside of the `except` block, where a script may try again with a lower rate."""
    callback = saves(tmp_path, every_n_train_steps=4)
    try:
        error, _, trainer = fit(InfiniteGradient, max_steps=8, callbacks=[callback])
        raise error
    except NotFiniteError:
        with pytest.raises(NotFiniteError, match="step 4, of samples"):
            trainer.save_checkpoint(tmp_path / "late.ckpt")
        error, *_ = fit(callbacks=[callback])
    assert error is None
    assert callback.save_on_exception
    assert written(tmp_path) == ["last.ckpt", "step=4.ckpt"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_large_half_precision_gradients_is_finite(dtype):
    weight = torch.nn.Parameter(torch.zeros(1_000_000, dtype=dtype))
    weight.grad = torch.full_like(weight, 100)
    assert gradient_norm([weight]).item() == pytest.approx(1e5, rel=1e-3)


@pytest.mark.parametrize("update_every", [1, 3])
def test_an_average_hides_no_broken_weights(fit, tmp_path, update_every):
    """Lightning puts the average in the draft's place at the end; training would go on from what it replaces."""
    average = EMAWeightAveraging(decay=0.5, update_every_n_steps=update_every)
    error, *_ = fit(Spoiled, max_steps=2, callbacks=[average, saves(tmp_path, every_n_train_steps=100)])
    assert "the draft's weights hold NaN or infinity (fc.weight)" in str(error)
    assert written(tmp_path) == []


def test_a_checkpoint_with_nan_is_not_resumed_from(fit, tmp_path):
    fit(max_steps=2)
    path = tmp_path / "checkpoints" / "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["draft.fc.weight"][0, 0] = math.nan
    torch.save(checkpoint, path)
    mark_complete(path, 2)
    error, *_ = fit(ckpt_path=path)
    assert "the checkpoint holds NaN or infinity (draft.fc.weight): resume from an older one" in str(error)


def test_a_head_with_infinity_is_refused(fit, target_path, tmp_path):
    """Its token's positions would be left out without a word where the draft's vocabulary is without it."""
    folder = shutil.copytree(target_path, tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][313, 3] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=f"the head of {folder} holds NaN or infinity"):
        Module(str(folder)).load_frozen_target(torch.device("cpu"))


def test_steps_that_a_grad_scaler_skips_are_no_error(fit, tmp_path):
    """Its first scales overflow; it halves them until one fits."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    error, _, trainer = fit(callbacks=[], max_steps=2, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert error is None
    assert scaler.get_scale() < 2.0**127, "no step overflowed"
    assert trainer.global_step == 2
