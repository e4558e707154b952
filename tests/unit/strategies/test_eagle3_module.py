"""The module in a real Trainer: gradients of the global quotient, exact resume, checks before the first step."""

from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_dataflow.callbacks import AcceptanceEvaluation, ResultWriter
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.fingerprint import early_fingerprint
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.strategies.checkpoint import load_module
from lightning_dataflow.strategies.common.layers import rotary_tables
from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from lightning_dataflow.strategies.eagle3.objective import TargetRows
from tests.prompts import data_set
from tests.streams import read_batches

GLOBAL_BATCH = 4


class SGDModule(Eagle3Module):
    """Plain SGD shows a gradient of the wrong scale, which AdamW hides. Keeps the last gradients."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def make_module(target_path: Path, cls=Eagle3Module, **options) -> Eagle3Module:
    return cls(str(target_path), **{"draft_vocab_size": 64, "num_steps": 3, "lr": 1e-2} | options)


def make_data(prompts, target, **options) -> DataFlowDataModule:
    source = OnlineSource(prompts[0], target)
    return DataFlowDataModule(source, **{"global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2} | options)


def make_trainer(folder: Path, data: DataFlowDataModule, max_steps: int = 4, cls=L.Trainer, **options) -> L.Trainer:
    accumulation = data.accumulate_grad_batches(1)
    fitting = {
        "max_steps": max_steps,
        "max_epochs": 1,
        "limit_train_batches": max_steps * accumulation,
        "accumulate_grad_batches": accumulation,
    }
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return cls(accelerator="cpu", default_root_dir=folder, **quiet, **fitting | options)


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


@pytest.mark.integration
def test_resume_is_exact(target_path, prompts, target, tmp_path):
    """Killed after 2 of 4 steps, in the middle of a window's micro-batches: same losses, same weights."""
    data, straight = make_data(prompts, target), make_module(target_path)
    make_trainer(tmp_path / "a", data).fit(straight, data)

    class StopInThirdWindow(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise KeyboardInterrupt

    data, killed = make_data(prompts, target), make_module(target_path)
    checkpoints = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "b", every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(SystemExit):
        make_trainer(tmp_path / "b", data, callbacks=[StopInThirdWindow(), checkpoints]).fit(killed, data)
    assert data.source.store.health()["num_samples"] == 0  # nothing of the unfinished window is left

    data, resumed = make_data(prompts, target), make_module(target_path)
    path = next((tmp_path / "b").glob("*step=2.ckpt"))
    make_trainer(tmp_path / "b", data).fit(resumed, data, ckpt_path=path)
    assert [float(loss) for loss in resumed.step_losses] == [float(loss) for loss in straight.step_losses]
    for (name, one), two in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.integration
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_resume_with_another_micro_batch_at_an_odd_step(target_path, prompts, target, tmp_path, micro_batch_size):
    data, straight = make_data(prompts, target), make_module(target_path)
    checkpoints = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    make_trainer(tmp_path, data, callbacks=[checkpoints]).fit(straight, data)
    data, resumed = make_data(prompts, target, micro_batch_size=micro_batch_size), make_module(target_path)
    trainer = make_trainer(tmp_path, data)
    trainer.fit(resumed, data, ckpt_path=next(tmp_path.glob("*step=3.ckpt")))
    assert trainer.global_step == 4
    assert data.next_seq == 4 * GLOBAL_BATCH
    assert [float(x) for x in resumed.step_losses] == pytest.approx([float(x) for x in straight.step_losses], rel=1e-5)


@pytest.mark.integration
def test_resume_from_a_checkpoint_inside_a_window(target_path, prompts, target, tmp_path):
    class SaveInside(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    data, straight = make_data(prompts, target), make_module(target_path)
    make_trainer(tmp_path, data, callbacks=[SaveInside()]).fit(straight, data)
    data, resumed = make_data(prompts, target), make_module(target_path)
    make_trainer(tmp_path, data).fit(resumed, data, ckpt_path=tmp_path / "inside.ckpt")
    assert [float(x) for x in resumed.step_losses] == [float(x) for x in straight.step_losses]
    assert data.next_seq == 4 * GLOBAL_BATCH


def test_a_second_fit_goes_on_from_the_draft_as_it_is(target_path, prompts, target, tmp_path):
    module = make_module(target_path, train_embeddings=True)
    data = make_data(prompts, target)
    make_trainer(tmp_path, data, max_steps=2).fit(module, data)
    trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.hparams["lr"] = 0.0
    fresh = make_data(prompts, target)
    module._window.add(module.objective(*read_batches(fresh, 1, module.collate), None))  # as an interrupted fit leaves it
    make_trainer(tmp_path, data, max_steps=1).fit(module, data)
    assert data.next_seq == GLOBAL_BATCH
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert len(module.step_losses) == 1
    assert float(module.step_losses[0]) < 100


def test_a_checkpoint_holds_the_draft_and_nothing_of_the_target(target_path, prompts, target, tmp_path):
    data, module = make_data(prompts, target), make_module(target_path)
    trainer = make_trainer(tmp_path, data, max_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "draft.ckpt")
    saved = torch.load(tmp_path / "draft.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("draft.") for name in saved)
    assert not any("embed" in name for name in saved)
    loaded = load_module(tmp_path / "draft.ckpt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    plain = Eagle3Module.load_from_checkpoint(tmp_path / "draft.ckpt")
    assert torch.equal(plain.draft.d2t, module.draft.d2t)
    # Training goes on from these weights: the data's vocabulary does not replace them.
    trainer = make_trainer(tmp_path, make_data(prompts, target), max_steps=1)
    plain.hparams["lr"] = 0.0
    trainer.fit(plain, make_data(prompts, target))
    assert torch.equal(plain.draft.lm_head.weight, module.draft.lm_head.weight)


def test_files_that_are_no_draft_checkpoints(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    for name, text in (("text", "hello"), ("brace", "{"), ("empty", "")):
        (tmp_path / f"{name}.ckpt").write_text(text)
    for name in ("other.ckpt", "text.ckpt", "brace.ckpt", "empty.ckpt", "missing.ckpt"):
        with pytest.raises(UserError, match=name):
            load_module(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 3}, r"max_epochs=3.*give max_epochs=1"),
        ({"max_epochs": -1}, r"max_epochs=-1.*give max_epochs=1"),
        ({"max_steps": -1, "limit_train_batches": 3}, r"max_steps=-1.*give max_steps=N"),
        ({"limit_train_batches": None}, r"limit_train_batches=1.0.*give limit_train_batches=8"),
        ({"limit_train_batches": 6}, r"limit_train_batches=6.*give limit_train_batches=8"),
        ({"accumulate_grad_batches": 1}, r"accumulate_grad_batches=1.*give accumulate_grad_batches=2"),
    ],
)
def test_trainers_that_would_spin_or_lose_data(target_path, prompts, target, tmp_path, options, message):
    data = make_data(prompts, target)
    with pytest.raises(UserError, match=message) as raised:
        make_trainer(tmp_path, data, **options).fit(make_module(target_path), data)
    assert "\n" not in str(raised.value)


def test_fast_dev_run(target_path, prompts, target, tmp_path):
    data = make_data(prompts, target, micro_batch_size=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", fast_dev_run=2, default_root_dir=tmp_path, **quiet)
    trainer.fit(make_module(target_path), data)
    assert trainer.global_step == 2
    assert not list(tmp_path.rglob("result.json"))


def test_a_data_module_of_ours_is_needed(target_path, prompts, target, tmp_path):
    data = make_data(prompts, target)
    with pytest.raises(UserError, match=r"call trainer\.fit\(module, datamodule\)"):
        make_trainer(tmp_path, data).fit(make_module(target_path), data.train_dataloader())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden_size": 128}, "hidden size"),
        ({"norm": "pre"}, "norm of the last hidden state"),
        ({"tokenizer_version": "other"}, "tokenizer"),
        ({"target_model_version": "other"}, "target weights"),
        ({"target_model_version": "2-0123456789abcdef"}, "target weights"),
    ],
)
def test_features_of_another_target(target_path, prompts, target, tmp_path, change, what):
    from dataclasses import replace

    data = make_data(prompts, target)
    card = data.source.card
    if "version" in next(iter(change)):
        data.source.card = replace(card, **change)
    else:
        data.source.card = replace(card, capture=replace(card.capture, **change))
    with pytest.raises(UserError, match=f"another {what} .*capture again"):
        make_trainer(tmp_path, data).fit(make_module(target_path), data)


def test_features_and_checkpoints_of_an_earlier_release_are_told_by_its_fingerprint(target_path, prompts, target, tmp_path):
    from dataclasses import replace

    module, data = make_module(target_path), make_data(prompts, target)
    early = early_fingerprint(target_path)
    module.check_features(replace(data.source.card, target_model_version=early))
    identity = {**module.identity(), "target weights": early}
    draft_vocab = {"prompts": "", "version": ""}
    module.check_checkpoint({"identity": identity, "draft_vocab": draft_vocab}, None)
    with pytest.raises(UserError, match=r"target weights=0123456789abcdef, this one has 2-"):
        module.check_checkpoint({"identity": {**identity, "target weights": "0123456789abcdef"}}, None)


def test_features_of_other_layers(target_path, prompts, target, tmp_path):
    with pytest.raises(
        UserError, match=r"layers \[1, 3, 4\], this eagle3 draft reads \[0, 1\]: capture again with strategy=eagle3"
    ):
        make_trainer(tmp_path, data := make_data(prompts, target)).fit(make_module(target_path, layer_ids=[0, 1]), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_vocab_size": 321}, "the target's vocabulary has 320 tokens"),
        ({"layer_ids": [1, 9]}, "ids go from 0 to 7"),
        ({"lk_loss": "beta"}, "use alpha, lambda"),
        ({"num_steps": 0}, "at least one step"),
        ({"target_dtype": "int4"}, "use float32 or bfloat16"),
    ],
)
def test_bad_arguments(target_path, options, message):
    with pytest.raises(UserError, match=message):
        make_module(target_path, **options)


def test_bad_warmup(target_path, prompts, target, tmp_path):
    data = make_data(prompts, target)
    with pytest.raises(UserError, match="warmup_ratio=2 is a share"):
        make_trainer(tmp_path, data).fit(make_module(target_path, warmup_ratio=2), data)


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


def test_no_prompts_to_evaluate_on(target):
    with pytest.raises(UserError, match=r"data\.num_eval_samples"):
        AcceptanceEvaluation(lambda: target, [])
