"""Train like train.py, but be killed half-way through writing the Nth checkpoint: kill_in_save.py N RANK OVERRIDES."""

import io
import os
import signal
import sys
from pathlib import Path

import torch

from lightning_dataflow import DataFlowTrainer
from lightning_dataflow.cli.train import main

NUMBER, RANK = int(sys.argv.pop(1)), int(sys.argv.pop(1))
save_tensors, save_checkpoint, saves = torch.save, DataFlowTrainer.save_checkpoint, []


def count(self, *arguments, **options):
    saves.append(self.global_rank)
    return save_checkpoint(self, *arguments, **options)


def write_half_and_die(value, file, *arguments, **options):
    if len(saves) < NUMBER or saves[-1] != RANK or isinstance(file, io.BytesIO):  # those go to other ranks
        return save_tensors(value, file, *arguments, **options)
    whole = io.BytesIO()
    save_tensors(value, whole)
    half = whole.getvalue()[: whole.tell() // 2]
    if isinstance(file, str | Path):
        Path(file).write_bytes(half)
    else:
        file.write(half)
        file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


DataFlowTrainer.save_checkpoint, torch.save = count, write_half_and_die  # type: ignore[method-assign]
main()
