"""Checkpoints that the store needs, in a real Trainer: when, under which names, and that a resume goes on at them."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dataflow.contracts import UserError
from tests.unit.strategies.fits import make_data, make_module, make_trainer


@pytest.fixture
def data(prompts, target):
    """Each second step must be saved; what was durable when."""
    data = make_data(prompts, target)
    data.source.durables = []
    data.source.must_save = lambda: data.next_seq % 8 == 0 and data.next_seq not in data.source.durables
    data.source.durable = lambda next_seq, step, freed=(): data.source.durables.append(next_seq)
    return data


def checkpoint(folder, **options) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="step-{step:06d}", auto_insert_metric_name=False, **options)


def saved(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


@pytest.mark.integration
def test_they_go_through_the_trainers_own_callback(target_path, data, tmp_path):
    newest = checkpoint(tmp_path, every_n_train_steps=5, monitor="step", mode="max", save_top_k=2)
    module = make_module(target_path)
    make_trainer(tmp_path, data, 7, callbacks=[newest]).fit(module, data)
    assert saved(tmp_path) == ["step-000005.ckpt", "step-000006.ckpt"]
    assert data.source.durables == [8, 16, 20, 24]
    again = make_module(target_path)
    data.source.must_save = lambda: False
    make_trainer(tmp_path, data, 7).fit(again, data, ckpt_path=tmp_path / "step-000006.ckpt", weights_only=True)
    assert again.step_losses == module.step_losses


@pytest.mark.integration
def test_one_is_kept_beside_the_best_of_a_metric(target_path, data, tmp_path):
    best = checkpoint(tmp_path, every_n_train_steps=1, monitor="train/loss", mode="max", save_top_k=1)
    make_trainer(tmp_path, data, 7, callbacks=[best], log_every_n_steps=1).fit(make_module(target_path), data)
    assert "step-000006.ckpt" in saved(tmp_path)
    assert len(saved(tmp_path)) <= 2
    assert set(data.source.durables) >= {8, 16, 24}


def test_without_a_checkpoint_callback_durable_is_refused(target_path, data, tmp_path):
    data.source.release_at = "durable"
    trainer = make_trainer(tmp_path, data, 2, enable_checkpointing=False)
    with pytest.raises(
        UserError, match="release_at=durable keeps features until a checkpoint, and this Trainer writes none"
    ):
        trainer.fit(make_module(target_path), data)
