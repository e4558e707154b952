"""Lightning's weight averaging on drafts: averaged weights, the vocabulary map as it was, and what is refused."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from lightning_dataflow import DataFlowTrainer, Eagle3Module, export_draft
from lightning_dataflow.callbacks import AcceptanceEvaluation
from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.checkpoint import load_module
from tests.unit.strategies.fits import make_data, make_module, make_trainer

pytestmark = pytest.mark.integration  # each test trains

STEPS = 4


class Watched(Eagle3Module):
    """Keeps the head of every draft that is measured."""

    def drafter(self, **options):
        self.measured = [*getattr(self, "measured", []), self.draft.lm_head.weight.detach().clone()]
        return super().drafter(**options)


@pytest.fixture
def fit(prompts, target, target_path, tmp_path):
    """fit(*callbacks) → the module and the Trainer; checkpoints of every step in `tmp_path`."""

    def call(*callbacks, cls=Watched, trainer_cls=DataFlowTrainer, ckpt_path=None, **options):
        data, module = make_data(prompts, target, micro_batch_size=4), make_module(target_path, cls, num_steps=2)
        saves = ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
        )
        options = {"callbacks": [saves, *callbacks]} | options
        trainer = make_trainer(tmp_path, data, max_steps=STEPS, cls=trainer_cls, **options)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, trainer

    return call


def saved(tmp_path, step):
    return torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)


def averaged(tmp_path, decay):
    """The head's moving average after every step, from the weights that training went on with."""
    heads = [saved(tmp_path, step)["current_model_state"]["draft.lm_head.weight"] for step in range(1, STEPS + 1)]
    averages = heads[:1]
    for head in heads[1:]:
        averages.append(decay * averages[-1] + (1 - decay) * head)
    return averages


@pytest.fixture
def vocab(prompts, target, target_path):
    data, module = make_data(prompts, target), make_module(target_path)
    return module._cut_vocab(data)


def check_maps(state, vocab, prefix="draft."):
    """`vocab` are the ids of the target that the draft's vocabulary has."""
    assert torch.equal(state[f"{prefix}d2t"], vocab - torch.arange(len(vocab)))
    assert torch.equal(state[f"{prefix}t2d"].nonzero().flatten(), vocab)


@pytest.mark.integration
@pytest.mark.parametrize("trainer_cls", [L.Trainer, DataFlowTrainer])
@pytest.mark.parametrize(
    ("decay", "options"), [(0.5, {}), (0.9, {"use_buffers": True}), (0.999, {}), (0.9, {"use_buffers": False})]
)
def test_weights_are_averaged_and_the_vocabulary_map_is_not(fit, tmp_path, vocab, decay, options, trainer_cls):
    """In the draft, in its checkpoints, and in what is exported."""
    module, _ = fit(EMAWeightAveraging(decay=decay, **options), trainer_cls=trainer_cls)
    check_maps(module.state_dict(), vocab)
    averages = averaged(tmp_path, decay)
    torch.testing.assert_close(module.draft.lm_head.weight.detach(), averages[-1])
    for step, average in enumerate(averages, start=1):
        checkpoint = saved(tmp_path, step)
        for name in ("state_dict", "current_model_state"):
            check_maps(checkpoint[name], vocab)
        torch.testing.assert_close(checkpoint["state_dict"]["draft.lm_head.weight"], average)
    path = tmp_path / f"step={STEPS}.ckpt"
    check_maps(load_module(path).state_dict(), vocab)
    exported = load_file(export_draft(path, tmp_path / "exported", engine="vllm", dtype="float32") / "model.safetensors")
    check_maps(exported, vocab, prefix="")
    torch.testing.assert_close(exported["lm_head.weight"], averages[-1])


def test_equal_weights_are_averaged_too(fit, tmp_path, vocab):
    module, _ = fit(WeightAveraging())
    check_maps(module.state_dict(), vocab)
    heads = [saved(tmp_path, step)["current_model_state"]["draft.lm_head.weight"] for step in range(1, STEPS + 1)]
    torch.testing.assert_close(module.draft.lm_head.weight.detach(), torch.stack(heads).mean(0))


def test_an_average_without_an_update_is_the_trained_draft(fit, tmp_path, vocab):
    module, trainer = fit(EMAWeightAveraging(update_starting_at_step=100))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    plain, _ = fit()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert torch.equal(after["state_dict"]["draft.lm_head.weight"], plain.draft.lm_head.weight)


def test_a_checkpoint_before_the_first_update_holds_the_draft(fit, tmp_path, vocab):
    fit(EMAWeightAveraging(update_starting_at_step=STEPS - 1))
    for step in range(1, STEPS):
        checkpoint = saved(tmp_path, step)
        check_maps(checkpoint["state_dict"], vocab)
        for name, tensor in checkpoint["current_model_state"].items():
            assert torch.equal(tensor, checkpoint["state_dict"][name]), name


def test_training_goes_on_from_the_weights_and_not_from_their_average(fit, tmp_path):
    """To the bit; and a checkpoint written after training, which has put the average into the draft, holds both."""
    _, trainer = fit(EMAWeightAveraging(decay=0.9))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    straight, after = saved(tmp_path, STEPS), torch.load(tmp_path / "after.ckpt", weights_only=True)
    (tmp_path / f"step={STEPS}.ckpt").unlink()
    fit(EMAWeightAveraging(decay=0.9), ckpt_path=tmp_path / "step=2.ckpt")
    resumed = saved(tmp_path, STEPS)
    for state in ("state_dict", "current_model_state", "averaging_state"):
        for name, tensor in straight[state].items():
            assert torch.equal(tensor, resumed[state][name]), name
            assert torch.equal(tensor, after[state][name]), name


def test_the_average_is_what_is_measured(fit, tmp_path, target, prompts):
    """Before training, after steps 2 and 4."""
    evaluation = AcceptanceEvaluation(lambda: target, [prompts[1][0].question], max_new_tokens=2, every_n_steps=2)
    module, _ = fit(EMAWeightAveraging(decay=0.9), evaluation)
    averages = averaged(tmp_path, 0.9)
    torch.testing.assert_close(module.measured[1:], [averages[1], averages[3]])
    assert not torch.equal(module.measured[2], saved(tmp_path, STEPS)["current_model_state"]["draft.lm_head.weight"])


@pytest.mark.parametrize(
    ("callback", "options", "difference"),
    [
        (
            StochasticWeightAveraging(swa_lrs=1e-3),
            {},
            "this would discard the training. Use Lightning's EMAWeightAveraging",
        ),
        (EMAWeightAveraging(), {"strategy": ModelParallelStrategy()}, "EMAWeightAveraging with ModelParallelStrategy: "),
    ],
)
def test_averaging_that_loses_the_training_or_fails_is_refused(fit, callback, options, difference):
    with pytest.raises(UserError) as error:
        fit(callback, **options)
    assert difference in str(error.value)
    assert "\n" not in str(error.value)
