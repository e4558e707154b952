"""A strategy from outside the package gets everything: training, evaluation, export with a card, and a warm start."""

import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_dataflow import DataFlowDataModule, DataFlowTrainer, export_draft, resolve_strategy
from lightning_dataflow.evaluation.acceptance import Decoding, evaluate_acceptance
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.strategies.checkpoint import load_module
from lightning_dataflow.targets import HFTargetEngine

RECIPE = Path(__file__).parents[3] / "recipes" / "own_strategy"


@pytest.fixture(scope="module")
def spec():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        import one_step  # noqa: F401  # registers itself

        yield resolve_strategy("one_step")
        del sys.modules["one_step"]


def fit(module, target_path, prompts, folder):
    """Train for two steps, from the beginning of the data; returns the last checkpoint."""
    engine = HFTargetEngine(target_path, layer_ids=module.layer_ids, dtype="float32", device="cpu")
    trainer = DataFlowTrainer(
        accelerator="cpu",
        max_steps=2,
        max_epochs=1,
        limit_train_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[L.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1)],
        default_root_dir=folder,
    )
    trainer.fit(module, DataFlowDataModule(OnlineSource(prompts[0], engine), global_batch_size=2, micro_batch_size=2))
    return folder / "step=2.ckpt", engine


@pytest.mark.integration
def test_it_trains_decodes_exports_and_starts_again(spec, target_path, prompts, tmp_path):
    module = spec.module(str(target_path), lr=1e-2)
    checkpoint, engine = fit(module, target_path, prompts, tmp_path / "first")
    assert len(module.step_losses) == 2

    questions = [list(prompt.question) for prompt in prompts[0][:2]]
    loaded = load_module(checkpoint)
    loaded.load_frozen_target(torch.device("cpu"))
    report = evaluate_acceptance(
        engine, loaded.drafter(num_draft_tokens=1), questions, Decoding(max_new_tokens=8), baseline=True
    )
    assert report.num_identical == 2

    folder = export_draft(checkpoint, tmp_path / "draft", engine="sglang", dtype="float32")
    assert json.loads((folder / "config.json").read_text())["target_layer_ids"] == list(module.layer_ids)
    card = (folder / "README.md").read_text()
    assert card.splitlines()[5] == "# OneStep draft of target"
    assert "--speculative-algorithm ONE_STEP " in card and "| optimizer steps | 2 |" in card

    warm = spec.module(str(target_path), init_from=str(folder), lr=1e-2)
    warm.load_frozen_target(torch.device("cpu"))
    warm.load_start()
    assert torch.equal(warm.draft.fc.weight, module.draft.fc.weight)
    fit(warm, target_path, prompts, tmp_path / "second")
    assert float(warm.step_losses[-1]) < float(module.step_losses[0])
