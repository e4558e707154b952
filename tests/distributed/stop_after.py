"""Train like train.py, but fail when step N is done: stop_after.py N OVERRIDES."""

import sys

import lightning as L

from lightning_dataflow.cli.train import main
from lightning_dataflow.strategies.module import DraftModule

LAST_STEP = int(sys.argv.pop(1))


class Fail(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == LAST_STEP:
            raise RuntimeError("stopped on purpose")


original = DraftModule.configure_callbacks
DraftModule.configure_callbacks = lambda self: [*original(self), Fail()]  # type: ignore[method-assign]
main()
