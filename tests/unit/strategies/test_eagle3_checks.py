"""What a module checks before the first step: trainer, features and arguments."""

import pytest

from lightning_dataflow.callbacks import AcceptanceEvaluation
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.fingerprint import early_fingerprint
from tests.unit.strategies.fits import make_data, make_module, make_trainer


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


def test_no_prompts_to_evaluate_on(target):
    with pytest.raises(UserError, match=r"data\.num_eval_samples"):
        AcceptanceEvaluation(lambda: target, [])
