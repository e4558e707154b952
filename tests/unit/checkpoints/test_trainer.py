"""A DataFlowTrainer: complete checkpoints, exact state, refusals. The fits are the smallest there are."""

import errno
import json
import os
import pickle
import random
import shutil

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_dataflow import DataFlowTrainer, DFlashModule, Eagle3Module, latest_checkpoint
from lightning_dataflow.callbacks import ResultWriter
from lightning_dataflow.checkpoints.files import CheckpointFiles
from lightning_dataflow.checkpoints.markers import mark_complete
from lightning_dataflow.checkpoints.reading import read_header
from lightning_dataflow.contracts import UserError
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.targets.tiny import write_tiny_target


class Source(OnlineSource):
    """Notes what it is told."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.durable_seqs = []
        self.skips, self.recaptures = {}, []

    def durable(self, next_seq, global_step, freed=()):
        self.durable_seqs.append(next_seq)

    def skipped(self):
        return self.skips

    def recaptured(self):
        return self.recaptures


class NoisyModule(Eagle3Module):
    """Draws from every global generator."""

    def training_step(self, batch, batch_idx):
        noise = torch.rand(()) + random.random() + random.gauss(0, 1) + np.random.rand() + np.random.randn()
        return super().training_step(batch, batch_idx) * noise


@pytest.fixture
def fit(tmp_path, target_path, prompts, target):
    """fit(max_steps, …) → (module, data, trainer); checkpoints every step in `tmp_path/checkpoints`, or `folder` there."""

    def call(
        max_steps=2,
        *,
        cls=Eagle3Module,
        seed=0,
        data=None,
        source=None,
        ckpt_path=None,
        callbacks=(),
        folder="checkpoints",
        **options,
    ):
        L.seed_everything(seed, verbose=False)
        module = cls(str(target_path), **{"draft_vocab_size": 64, "num_steps": 2} | options)
        source = source or Source(prompts[0], target)
        data = DataFlowDataModule(source, **{"global_batch_size": 2, "micro_batch_size": 2} | (data or {}))
        saves = ModelCheckpoint(
            tmp_path / folder,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            every_n_train_steps=1,
            monitor="step",
            mode="max",
            save_top_k=2,
            enable_version_counter=False,
        )
        trainer = DataFlowTrainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=max_steps,
            max_epochs=1,
            accumulate_grad_batches=(accumulation := data.accumulate_grad_batches(1)),
            limit_train_batches=max_steps * accumulation,
            callbacks=[saves, *callbacks],
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, data, trainer

    return call


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def numbers(losses):
    return [float(loss) for loss in losses]


def test_two_complete_checkpoints_are_kept_and_durability_follows(fit, tmp_path):
    _, data, trainer = fit(3)
    folder = tmp_path / "checkpoints"
    assert names(folder) == [f"step-00000{step}.ckpt{suffix}" for step in (2, 3) for suffix in ("", ".complete")]
    assert latest_checkpoint(folder) == folder / "step-000003.ckpt"
    assert data.source.durable_seqs == [2, 4, 6]  # the last one too
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    assert latest_checkpoint(folder) == folder / "step-000003.ckpt"
    assert data.source.durable_seqs == [2, 4, 6]


@pytest.mark.integration
def test_a_save_that_fails_half_way_is_no_checkpoint(fit, tmp_path, monkeypatch):
    """Also where a complete one had that name, and nothing is called durable."""
    save, calls = torch.save, []

    def save_half(checkpoint, file):
        calls.append(file)
        save(checkpoint, file)
        if len(calls) == 3:
            file.truncate(file.tell() // 2)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    source_durable = []
    monkeypatch.setattr(Source, "durable", lambda self, next_seq, step, freed=(): source_durable.append(next_seq))
    with pytest.raises(OSError, match="No space"):
        fit(4)
    folder = tmp_path / "checkpoints"
    assert source_durable == [2, 4]
    assert latest_checkpoint(folder) == folder / "step-000002.ckpt"
    del calls[2:]
    with pytest.raises(OSError, match="No space"):
        fit(4, ckpt_path=folder / "step-000001.ckpt")  # fails at 2
    assert latest_checkpoint(folder) == folder / "step-000001.ckpt"
    module, *_ = fit(4, ckpt_path=latest_checkpoint(folder))
    monkeypatch.undo()
    assert not list(folder.glob(".*"))
    straight, *_ = fit(4)
    assert numbers(module.step_losses) == numbers(straight.step_losses)


@pytest.mark.integration
def test_random_and_optimizer_state_are_restored_exactly(fit, tmp_path):
    straight, _, trainer = fit(3, cls=NoisyModule)
    resumed, _, other = fit(3, cls=NoisyModule, ckpt_path=tmp_path / "checkpoints" / "step-000002.ckpt", seed=0)
    assert numbers(resumed.step_losses) == numbers(straight.step_losses)
    for one, two in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    states = [one.optimizers[0].state_dict()["state"] for one in (trainer, other)]
    for index, state in states[0].items():
        for name, tensor in state.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, states[1][index][name])


@pytest.mark.integration
def test_a_checkpoint_from_inside_a_window_is_of_its_start(fit, tmp_path):
    class SaveInside(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    small = {"micro_batch_size": 1}
    straight, *_ = fit(3, cls=NoisyModule, data=small, callbacks=[SaveInside()])
    marker = tmp_path / "checkpoints" / "step-000002.ckpt.complete"
    written = marker.stat().st_mtime_ns
    resumed, *_ = fit(3, cls=NoisyModule, data=small, ckpt_path=tmp_path / "inside.ckpt")
    assert numbers(resumed.step_losses) == numbers(straight.step_losses)
    assert marker.stat().st_mtime_ns > written
    written = marker.stat().st_mtime_ns
    resumed, *_ = fit(3, cls=NoisyModule, data=small, ckpt_path=tmp_path / "checkpoints" / "step-000002.ckpt")
    assert numbers(resumed.step_losses) == numbers(straight.step_losses)
    assert marker.stat().st_mtime_ns == written  # not saved once more, in the middle of the third window


@pytest.mark.integration
def test_a_resumed_result_tells_of_the_whole_run(fit, tmp_path, prompts, target):
    source = Source(prompts[0], target)
    source.skips, source.recaptures = {1: "broken", 90: "ahead of the cursor"}, [1, 2, 90]
    writer = ResultWriter(str(tmp_path))
    fit(2, source=source, callbacks=[writer])
    first = json.loads((tmp_path / "result.json").read_text())
    assert first["seqs_skipped_while_training"] == [1]
    source = Source(prompts[0], target)
    source.skips, source.recaptures = {5: "gone"}, [5]
    _, data, _ = fit(4, source=source, callbacks=[writer], ckpt_path=tmp_path / "checkpoints" / "step-000002.ckpt")
    second = json.loads((tmp_path / "result.json").read_text())
    assert second["losses"][:2] == first["losses"]
    assert second["seqs_skipped_while_training"] == [1, 5]
    assert (second["samples_trained"], second["samples_recaptured"]) == (6, 3)
    assert second["samples_skipped_by_reason"]["broken"] == 1
    assert second["throughput"]["seconds"] > first["throughput"]["seconds"]
    data.start(resumed=False)
    assert (data.skipped(), data.num_recaptured()) == ({}, 1)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"cls": DFlashModule}, "strategy=eagle3, this one has dflash"),
        ({"target": "other"}, "target weights="),
        ({"draft_vocab_size": 65}, "draft_vocab_size=64, this one has 65"),
        ({"data": {"global_batch_size": 4}}, "global_batch_size=2, this run has 4"),
        ({"data": {"seed": 1}}, "seed=0, this run has 1"),
        ({"data": {"run_id": "mine"}}, "belongs to the run theirs, this is mine"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(fit, tmp_path, monkeypatch, target_path, prompts, change, difference):
    fit(1, data={"run_id": "theirs"})
    path = tmp_path / "checkpoints" / "step-000001.ckpt"
    cls = change.get("cls", Eagle3Module)
    sizes = {} if cls is DFlashModule else {"draft_vocab_size": change.get("draft_vocab_size", 64), "num_steps": 2}
    folder = write_tiny_target(tmp_path / "other", seed=1) if "target" in change else target_path
    module = cls(str(folder), **sizes)
    settings = {"global_batch_size": 2, "run_id": "theirs"} | change.get("data", {})
    from lightning_dataflow.targets import HFTargetEngine

    target = HFTargetEngine(folder, layer_ids=module.layer_ids, dtype="float32", device="cpu")
    data = DataFlowDataModule(OnlineSource(prompts[0], target), **settings)
    with pytest.raises(UserError) as error:
        DataFlowTrainer(accelerator="cpu", logger=False, default_root_dir=tmp_path).fit(module, data, ckpt_path=path)
    assert difference in str(error.value)
    assert "\n" not in str(error.value)


def test_another_tokenizer_or_vocabulary_map_is_refused(fit, tmp_path, target_path, prompts, target, monkeypatch):
    fit(1)
    header = read_header(tmp_path / "checkpoints" / "step-000001.ckpt")
    module = Eagle3Module(str(target_path), draft_vocab_size=64, num_steps=2)
    source = OnlineSource(prompts[0], target)
    data = DataFlowDataModule(source, global_batch_size=2)
    module.check_checkpoint(header, data)
    other = header | {"identity": header["identity"] | {"tokenizer": "0123"}}
    with pytest.raises(UserError, match="tokenizer=0123, this one has"):
        module.check_checkpoint(other, data)
    counts = source.token_counts(320)
    monkeypatch.setattr(source, "token_counts", lambda vocab_size: counts.flip(0))
    with pytest.raises(UserError, match="another vocabulary map"):
        module.check_checkpoint(header, data)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"strategy": "eagle3", "hyper_parameters": Attack(tmp_path / "owned")}, tmp_path / "file.ckpt")
    with pytest.raises(UserError, match="not a draft's checkpoint"):
        read_header(tmp_path / "file.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        CheckpointFiles().load_checkpoint(tmp_path / "file.ckpt", weights_only=False)
    folder = tmp_path / "folder.ckpt"
    folder.mkdir()
    torch.save({"strategy": "eagle3", "hyper_parameters": {}}, folder / "meta.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    with pytest.raises(UserError, match=r"names posix\.mkdir"):
        read_header(folder)
    assert not (tmp_path / "owned").exists()


def save_sharded(folder, value):
    from torch.distributed import checkpoint as dcp

    dcp.save({"state_dict": {"w": torch.ones(1000)}, "optimizer_0": {"lr": value}}, checkpoint_id=folder, no_dist=True)
    torch.save({"strategy": "eagle3", "hyper_parameters": {}}, folder / "meta.pt")


def test_shards_are_looked_into_before_torch_does(tmp_path):
    save_sharded(tmp_path / "fine.ckpt", 0.1)
    assert read_header(tmp_path / "fine.ckpt")["strategy"] == "eagle3"
    save_sharded(tmp_path / "attack.ckpt", Attack(tmp_path / "owned"))
    with pytest.raises(UserError, match="not a draft's checkpoint"):
        read_header(tmp_path / "attack.ckpt")
    assert not (tmp_path / "owned").exists()
    shard = next((tmp_path / "fine.ckpt").glob("*.distcp"))
    os.truncate(shard, 100)
    with pytest.raises(UserError, match="is missing or cut short"):
        read_header(tmp_path / "fine.ckpt")


@pytest.mark.integration
@pytest.mark.parametrize("victim", ["local://{}", "file://{}", "{}", "checkpoints/../{}", "local://checkpoints/../{}"])
def test_a_checkpoint_that_names_others_removes_none_of_them(fit, tmp_path, monkeypatch, victim):
    """A crafted list of the best checkpoints, each of which the next saves would replace."""
    monkeypatch.chdir(tmp_path)
    fit(2)
    path = tmp_path / "checkpoints" / "step-000002.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    named = [victim.format(name) for name in ("victim", "other.ckpt")]
    for name in ("victim", "other.ckpt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.pt").write_text("keep")
    state["best_k_models"] = {name: torch.tensor(-1.0) for name in named}
    state |= {"kth_best_model_path": named[0], "kth_value": torch.tensor(-1.0), "best_model_path": named[1]}
    state["last_model_path"] = named[1]
    torch.save(checkpoint, path)
    mark_complete(path, 2)
    with pytest.warns(UserWarning, match="the list is left out"):
        module, *_ = fit(5, ckpt_path=path)
    assert all((tmp_path / name / "meta.pt").exists() for name in ("victim", "other.ckpt"))
    assert len(module.step_losses) == 5
    assert [name for name in names(tmp_path / "checkpoints") if name.endswith("ckpt")] == [
        f"step-00000{step}.ckpt"
        for step in (1, 2, 4, 5)  # the first two are listed nowhere now
    ]


@pytest.mark.integration
def test_a_run_that_was_moved_goes_on_and_leaves_its_old_folder_alone(fit, tmp_path):
    fit(2)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "moved")
    before = names(tmp_path / "checkpoints")
    with pytest.warns(UserWarning, match="the list is left out"):
        moved, *_ = fit(5, ckpt_path=tmp_path / "moved" / "step-000002.ckpt", folder="moved")
    assert names(tmp_path / "checkpoints") == before
    stayed, *_ = fit(5, ckpt_path=tmp_path / "checkpoints" / "step-000002.ckpt")
    assert numbers(moved.step_losses) == numbers(stayed.step_losses)
    assert latest_checkpoint(tmp_path / "moved") == tmp_path / "moved" / "step-000005.ckpt"


def test_a_plugin_that_returns_before_the_file_is_there_is_refused():
    with pytest.raises(UserError, match="leave CheckpointIO out"):
        DataFlowTrainer(plugins=[AsyncCheckpointIO()])
