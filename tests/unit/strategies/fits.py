"""Small fits of an eagle3 module on the tiny target: the module, its data and a Trainer."""

from pathlib import Path

import lightning as L

from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.strategies.eagle3.module import Eagle3Module

GLOBAL_BATCH = 4


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
