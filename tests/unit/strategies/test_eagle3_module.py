"""The module in a real Trainer: gradients of the global quotient, its schedule, and precision."""

import lightning as L
import pytest
import torch

from lightning_dataflow.callbacks import AcceptanceEvaluation, ResultWriter
from lightning_dataflow.strategies.common.layers import rotary_tables
from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from lightning_dataflow.strategies.eagle3.objective import TargetRows
from tests.prompts import data_set
from tests.streams import read_batches
from tests.unit.strategies.fits import GLOBAL_BATCH, make_data, make_module, make_trainer


class SGDModule(Eagle3Module):
    """Plain SGD shows a gradient of the wrong scale, which AdamW hides. Keeps the last gradients."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.integration
def test_gradients_and_a_clipped_sgd_step_do_not_depend_on_the_micro_batch(
    target_path, prompts, target, tmp_path, clip, train_embeddings
):
    modules = []
    for micro_batch_size in (1, 2, 4):
        data = make_data(prompts, target, micro_batch_size=micro_batch_size)
        module = make_module(target_path, SGDModule, train_embeddings=train_embeddings)
        make_trainer(tmp_path, data, max_steps=2, gradient_clip_val=clip).fit(module, data)
        modules.append(module)
    first = modules[0]
    for other in modules[1:]:
        assert first.gradients.keys() == other.gradients.keys()
        for name, gradient in first.gradients.items():
            assert (gradient - other.gradients[name]).abs().max() < 1e-5 * gradient.abs().max() + 1e-9, name
        for (name, one), two in zip(first.named_parameters(), other.parameters(), strict=True):
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-7), name
        assert first.step_losses == pytest.approx(other.step_losses, rel=1e-5)


def test_the_gradient_is_that_of_the_global_quotient(target_path, prompts, target, tmp_path):
    """Against one backward pass over the whole window, divided by its own denominator."""
    data = make_data(prompts, target, micro_batch_size=1)
    trained = make_module(target_path, SGDModule)
    make_trainer(tmp_path, data, max_steps=1).fit(trained, data)

    whole = make_data(prompts, target, micro_batch_size=GLOBAL_BATCH)
    module = make_module(target_path)
    module.load_frozen_target(torch.device("cpu"))
    module.initialise_draft(whole)
    sums = module.objective(*read_batches(whole, 1, module.collate), None)
    (sums.loss.numerator / sums.loss.denominator).backward()
    assert float(trained.step_losses[0]) == pytest.approx((sums.loss.numerator / sums.loss.denominator).item(), rel=1e-6)
    for name, parameter in module.named_parameters():
        assert (parameter.grad - trained.gradients[name]).abs().max() < 1e-5 * parameter.grad.abs().max(), name


def test_a_window_without_supervision_is_a_step_with_zero_gradient(target_path, prompts, target, tmp_path):
    data = make_data(prompts, target)
    module = make_module(target_path, SGDModule)
    collate = module.collate

    def unsupervised(samples):
        batch = collate(samples)
        batch["target_rows"] = TargetRows(*(part[:0] for part in batch["target_rows"]))
        return batch

    module.collate = unsupervised
    trainer = make_trainer(tmp_path, data, max_steps=2)
    trainer.fit(module, data)
    assert trainer.global_step == 2
    assert all(gradient.abs().max() == 0 for gradient in module.gradients.values())
    assert [float(loss) for loss in module.step_losses] == [0.0, 0.0]


def test_a_new_draft_takes_vocabulary_and_head_from_data_and_target(target_path, prompts, target, tmp_path):
    data, module = make_data(prompts, target), make_module(target_path, lr=0.0)
    make_trainer(tmp_path, data, max_steps=1).fit(module, data)
    counts = data.source.token_counts(320)
    kept = module.draft.target_ids
    assert counts[kept].min() >= counts[~module.draft.t2d].max()
    assert torch.equal(module.draft.lm_head.weight, target.model.lm_head.weight[kept])


def test_initial_weights_depend_on_the_seed_alone(target_path):
    one = make_module(target_path).draft.fc.weight
    torch.rand(7)
    assert torch.equal(one, make_module(target_path).draft.fc.weight)
    assert not torch.equal(one, make_module(target_path, seed=1).draft.fc.weight)


def test_fast_dev_run(target_path, prompts, target, tmp_path):
    data = make_data(prompts, target, micro_batch_size=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", fast_dev_run=2, default_root_dir=tmp_path, **quiet)
    trainer.fit(make_module(target_path), data)
    assert trainer.global_step == 2
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.integration
def test_learning_rate_schedule(target_path, prompts, target, tmp_path):
    data = make_data(prompts, target)
    module = make_module(target_path, lr=1.0, warmup_ratio=0.25, min_lr_ratio=0.1)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    make_trainer(tmp_path, data, max_steps=8, callbacks=[Watch()]).fit(module, data)
    rates = seen[::2]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert rates[-1] > 0.1


@pytest.mark.integration
@pytest.mark.parametrize("lk_loss", [None, "alpha", "lambda"])
def test_training_lowers_the_loss(target_path, prompts, target, tmp_path, lk_loss):
    """The same two samples over and over are learnt."""
    few = (data_set(prompts[0][:2]), prompts[1])
    data = make_data(few, target, global_batch_size=2)
    module = make_module(target_path, lk_loss=lk_loss, num_steps=2)
    make_trainer(tmp_path, data, max_steps=30, gradient_clip_val=1.0).fit(module, data)
    losses = [float(loss) for loss in module.step_losses]
    assert losses[-1] < 0.85 * losses[0]


def test_bf16_true_counts_exactly(target_path, prompts, target, tmp_path):
    """Parameters are rounded; counts, losses and positions are not."""
    data, exact = make_data(prompts, target), make_module(target_path, lr=0.0)
    make_trainer(tmp_path, data, max_steps=1, precision="bf16-true").fit(exact, data)
    assert exact.dtype == torch.bfloat16
    assert float(exact.step_losses[0]) == pytest.approx(
        float(_loss_in_float32(target_path, prompts, target, tmp_path)), rel=0.02
    )
    cos, _ = rotary_tables(torch.arange(500), exact.draft.config)
    expected, _ = rotary_tables(torch.arange(500), make_module(target_path).draft.config)
    assert torch.equal(cos, expected)


def _loss_in_float32(target_path, prompts, target, tmp_path):
    data, module = make_data(prompts, target), make_module(target_path, lr=0.0)
    make_trainer(tmp_path, data, max_steps=1).fit(module, data)
    return module.step_losses[0]


def test_norms_do_not_decay(target_path):
    from lightning_dataflow.strategies.optimisation import adamw

    module = make_module(target_path)
    optimizer = adamw(module.named_parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decaying, others = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert len(decaying) + len(others) == len(names)
    assert all("norm" in name for name in others)
    assert not any("norm" in name for name in decaying)


@pytest.mark.integration
def test_bf16_mixed_trains(target_path, prompts, target, tmp_path):
    data, exact = make_data(prompts, target), make_module(target_path)
    make_trainer(tmp_path, data).fit(exact, data)
    data, rounded = make_data(prompts, target), make_module(target_path)
    make_trainer(tmp_path, data, precision="bf16-mixed").fit(rounded, data)
    assert [float(x) for x in rounded.step_losses] == pytest.approx([float(x) for x in exact.step_losses], rel=0.05)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}


def test_default_callbacks_yield_to_the_users_own(target_path, prompts, target, tmp_path):
    import json

    data = make_data(prompts, target)
    mine = ResultWriter(str(tmp_path / "mine"), settings={"note": "hello"})
    evaluation = AcceptanceEvaluation(
        lambda: target, [prompts[1][0].question], num_draft_tokens=2, max_new_tokens=4, every_n_steps=3
    )
    trainer = make_trainer(tmp_path, data, callbacks=[mine, evaluation], log_every_n_steps=1)
    trainer.fit(make_module(target_path), data)
    assert [type(callback).__name__ for callback in trainer.callbacks].count("ResultWriter") == 1
    result = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert result["settings"] == {"note": "hello"}
    assert result["status"] == "completed"
    assert len(result["losses"]) == 4
    assert result["samples_trained"] == 4 * GLOBAL_BATCH
    assert result["throughput"]["tokens_per_second"] > 0
    assert 0 < result["throughput"]["data_wait_fraction"] < 1
    assert [one["step"] for one in result["acceptance"]] == [0, 3, 4]
    for name in ("train/loss", "train/accuracy_0", "train/acceptance_length_greedy", "val/acceptance_length", "tokens/s"):
        assert name in result["metrics"]
