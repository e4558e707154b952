"""Modules and stores that make what is not finite, and what a fit of them leaves."""

import json
import math

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dataflow import Eagle3Module

SPOILS = {"lr": 1e20, "warmup_ratio": 0.0}


class Module(Eagle3Module):
    """Keeps the weights that each window began with, by the number of steps before it."""

    def on_train_start(self):
        super().on_train_start()
        self.before = {}

    def training_step(self, batch, batch_idx):
        self.before[self.trainer.global_step] = [parameter.detach().clone() for parameter in self.parameters()]
        return super().training_step(batch, batch_idx)


class InfiniteGradient(Module):
    """Of one weight, from the second step on; the loss stays finite."""

    bad_steps = range(2, 100)

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step + 1 in self.bad_steps:
            self.draft.fc.weight.grad[0, 0] = math.inf
        super().on_before_optimizer_step(optimizer)


class Spoiled(Module):
    """The second step makes a weight infinite."""

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        if len(self.step_losses) == 2:
            with torch.no_grad():
                self.draft.fc.weight[0, 0] = math.inf


def saves(folder, **options) -> ModelCheckpoint:
    settings = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_exception": True, "save_last": True} | options
    return ModelCheckpoint(folder / "checkpoints", filename="{step}", **settings)


def written(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.ckpt"))


def status(folder) -> str:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((folder / "result.json").read_text(), parse_constant=refuse)["status"]
