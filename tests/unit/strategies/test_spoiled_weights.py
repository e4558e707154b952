"""What is saved and read: no checkpoint holds spoiled weights, and nothing is resumed from them."""

import math
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, OnExceptionCheckpoint
from safetensors.torch import load_file, save_file

from lightning_dataflow import DataFlowTrainer, latest_checkpoint
from lightning_dataflow.checkpoints.markers import mark_complete
from lightning_dataflow.contracts import NotFiniteError
from tests.unit.strategies.not_finite import SPOILS, InfiniteGradient, Module, Spoiled, saves, status, written

pytestmark = pytest.mark.integration  # each test trains


class NothingButBadSteps(InfiniteGradient):
    bad_steps = range(100)


def test_without_a_limit_the_last_weights_are_tried(fit, tmp_path):
    error, *_ = fit(callbacks=[], max_steps=6, max_bad_steps=None, **SPOILS)
    assert str(error).startswith("step 6, of samples ")
    assert "the loss through the draft's weights after it is NaN or infinity, so they are not saved" in str(error)


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
