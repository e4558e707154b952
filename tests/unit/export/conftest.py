"""Fits of the tiny target, and checkpoints of them; the export command."""

from pathlib import Path

import pytest

from lightning_dataflow import DataFlowTrainer
from lightning_dataflow.cli import export as command
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.targets import HFTargetEngine
from tests.unit.export.checkpoints import KINDS, saver


@pytest.fixture(scope="session")
def engines(target_path) -> dict[tuple[int, ...], HFTargetEngine]:
    layers = ((1, 3, 4), (1, 2, 3, 4, 5))
    return {ids: HFTargetEngine(target_path, layer_ids=ids, dtype="float32", device="cpu") for ids in layers}


@pytest.fixture(scope="session")
def fit(prompts, engines, tmp_path_factory):
    """fit(module, steps) → the trainer, from the beginning of the data."""

    def call(module, max_steps=2, **options):
        data = DataFlowDataModule(
            OnlineSource(prompts[0], engines[module.layer_ids]), global_batch_size=2, micro_batch_size=2
        )
        trainer = DataFlowTrainer(
            accelerator="cpu",
            default_root_dir=tmp_path_factory.mktemp("fit"),
            max_steps=max_steps,
            max_epochs=1,
            limit_train_batches=max_steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, data)
        return trainer

    return call


@pytest.fixture(scope="session")
def checkpoint(target_path, fit, tmp_path_factory):
    """checkpoint(kind) → the last one of a run of two steps, made once."""
    made: dict[str, Path] = {}

    def call(kind="eagle3") -> Path:
        if kind not in made:
            cls, options = KINDS[kind]
            checkpoints = tmp_path_factory.mktemp(kind) / "run" / "checkpoints"
            trainer = fit(cls(str(target_path), lr=1e-2, **options), callbacks=[saver(checkpoints)])
            assert trainer.global_step == 2
            made[kind] = checkpoints / "step=2.ckpt"
        return made[kind]

    return call


@pytest.fixture
def run_command(capsys):
    """run_command(arguments) → status and error lines, which Python prints for an exit with a message."""

    def call(*arguments):
        try:
            command.main([str(one) for one in arguments])
        except SystemExit as error:
            message = [error.code] if isinstance(error.code, str) else []
            lines = [*capsys.readouterr().err.splitlines(), *message]
            return 1 if message else error.code, lines
        return 0, capsys.readouterr().err.splitlines()

    return call
