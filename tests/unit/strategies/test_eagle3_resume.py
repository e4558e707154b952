"""A module's checkpoints: exact resume, further fits, and what a file holds."""

import lightning as L
import pytest
import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.checkpoint import load_module
from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from tests.streams import read_batches
from tests.unit.strategies.fits import GLOBAL_BATCH, make_data, make_module, make_trainer


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


@pytest.mark.integration
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


@pytest.mark.integration
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
