"""Fits that may meet what is not finite."""

import pytest

from lightning_dataflow import DataFlowTrainer
from lightning_dataflow.contracts import NotFiniteError
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import OnlineSource
from tests.unit.strategies.fits import make_trainer
from tests.unit.strategies.not_finite import Module, saves


@pytest.fixture
def fit(tmp_path, target_path, prompts, target):
    """fit(cls, …) → (error, module, trainer); a checkpoint after every step, unless `callbacks` are given."""

    def call(
        cls=Module,
        *,
        max_steps=4,
        store=None,
        callbacks=None,
        trainer_cls=DataFlowTrainer,
        plugins=None,
        ckpt_path=None,
        max_bad_steps=3,
        **options,
    ):
        callbacks = [saves(tmp_path)] if callbacks is None else callbacks
        module = cls(str(target_path), **{"draft_vocab_size": 64, "num_steps": 2, "lr": 1e-3} | options)
        data = DataFlowDataModule(OnlineSource(prompts[0], target, store), global_batch_size=2, micro_batch_size=1)
        options = {"callbacks": callbacks, "enable_checkpointing": bool(callbacks), "plugins": plugins or []}
        if trainer_cls is DataFlowTrainer:
            options["max_bad_steps"] = max_bad_steps
        trainer = make_trainer(tmp_path, data, max_steps, trainer_cls, **options)
        try:
            trainer.fit(module, data, ckpt_path=ckpt_path)
        except NotFiniteError as error:
            return error, module, trainer
        return None, module, trainer

    return call
