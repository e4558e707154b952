"""Two clipped SGD steps on the tiny target: sgd_worker.py STRATEGY TARGET PROMPTS TRAINER CLIP OUTPUT. Rank 0 writes
gradients and weights."""

import sys

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from small_fits import QUIET, online_data
from torch.distributed.tensor import DTensor

import lightning_dataflow as ldf
from lightning_dataflow.run.ranks import leave_process_group

STEPS, GLOBAL_BATCH = 2, 8


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class SGD:
    """AdamW hides a gradient of the wrong scale; SGD does not."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients = {name: whole(p.grad) for name, p in self.named_parameters() if p.grad is not None}


class Eagle3(SGD, ldf.Eagle3Module):
    pass


class DFlash(SGD, ldf.DFlashModule):
    pass


class Domino(SGD, ldf.DominoModule):
    pass


SMALL = {"num_layers": 2, "block_size": 6, "num_anchors": 12}
MODULES = {
    "eagle3": (Eagle3, {"draft_vocab_size": 96, "num_steps": 3}),
    "dflash": (DFlash, SMALL),
    "domino": (Domino, SMALL | {"gru_hidden_dim": 8, "emb_dim": 8, "lambda_start": 0.5}),
}
strategy, target_path, prompt_file, trainer_name, clip, output = sys.argv[1:]
devices = 1 if trainer_name == "one" else 2
strategies = {"one": "auto", "ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
module_class, options = MODULES[strategy]
module = module_class(target_path, **options)
if strategy == "domino":  # a new draft corrects nothing, so that its GRU has no gradient
    torch.nn.init.normal_(module.draft.correction_weight, generator=torch.Generator().manual_seed(0))
data = online_data(module, target_path, prompt_file, GLOBAL_BATCH)
accumulation = data.accumulate_grad_batches(devices)
trainer = L.Trainer(
    accelerator="cpu",
    devices=devices,
    strategy=strategies[trainer_name],
    max_steps=STEPS,
    max_epochs=1,
    accumulate_grad_batches=accumulation,
    limit_train_batches=STEPS * accumulation,
    gradient_clip_val=float(clip) or None,
    **QUIET,
)
trainer.fit(module, data)
weights = {name: whole(parameter) for name, parameter in module.named_parameters()}
if trainer.is_global_zero:
    torch.save({"gradients": module.gradients, "weights": weights}, output)
leave_process_group()
