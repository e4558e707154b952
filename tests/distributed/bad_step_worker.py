"""Three steps, the second of which is bad on one rank: bad_step_worker.py TARGET PROMPTS TRAINER FUSED OUTPUT. Every rank
checks that the step changed nothing there; rank 0 writes the seqs that were skipped, and a checkpoint beside them."""

import json
import math
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from small_fits import QUIET, FSDP1OnCPU, online_data

import lightning_dataflow as ldf
from lightning_dataflow.run.ranks import leave_process_group


def local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach().clone()


class Module(ldf.Eagle3Module):
    """A GPU's optimizer, if asked for; keeps what each step began with."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["fused"] = fused == "fused" or None
        return configured

    def on_train_batch_start(self, batch, batch_idx):
        state = self.trainer.optimizers[0].state.values()
        moments = [local(value) for values in state for value in values.values()]
        began.append([local(parameter) for parameter in self.parameters()] + moments)

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step == 1 and self.trainer.global_rank == 1:
            gradient = next(parameter.grad for parameter in self.parameters() if parameter.grad is not None)
            getattr(gradient, "_local_tensor", gradient).view(-1)[0] = math.inf
        super().on_before_optimizer_step(optimizer)


target_path, prompt_file, trainer_name, fused, output = sys.argv[1:]
began: list[list[torch.Tensor]] = []
strategies = {
    "ddp": lambda module: "ddp",
    "fsdp1": lambda module: FSDP1OnCPU(auto_wrap_policy={type(module.draft)}, state_dict_type="sharded"),
    "fsdp2": lambda module: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}
module = Module(target_path, draft_vocab_size=96, num_steps=3)
data = online_data(module, target_path, prompt_file, 4)
trainer = ldf.DataFlowTrainer(
    accelerator="cpu",
    devices=2,
    strategy=strategies[trainer_name](module),
    max_steps=3,
    max_epochs=1,
    limit_train_batches=3,
    gradient_clip_val=0.5,
    **QUIET,
)
trainer.fit(module, data)
trainer.save_checkpoint(Path(output).with_suffix(".ckpt"))
before, after = began[1:3]
assert len(before) == len(after) and all(map(torch.equal, before, after)), "the bad step changed something"
assert not all(map(torch.equal, after, [local(parameter) for parameter in module.parameters()])), "nothing is trained"
if trainer.is_global_zero:
    Path(output).write_text(json.dumps(sorted(data.skipped())))
leave_process_group()
