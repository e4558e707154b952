"""One step under FullyShardedDataParallel: fsdp1_worker.py TARGET PROMPTS CHECKPOINT OUTPUT. Saves a sharded checkpoint,
and, by rank 0, the draft's whole state; saving a full checkpoint on a CPU ended in SIGSEGV (torch 2.13.0).
"""

import sys

import torch
from small_fits import QUIET, FSDP1OnCPU, online_data

import lightning_dataflow as ldf
from lightning_dataflow.run.ranks import leave_process_group

target_path, prompt_file, checkpoint, output = sys.argv[1:]
module = ldf.Eagle3Module(target_path, draft_vocab_size=96, num_steps=3)
data = online_data(module, target_path, prompt_file, 4)
trainer = ldf.DataFlowTrainer(
    accelerator="cpu",
    devices=2,
    strategy=FSDP1OnCPU(auto_wrap_policy={type(module.draft)}, state_dict_type="sharded"),
    max_steps=1,
    max_epochs=1,
    limit_train_batches=1,
    **QUIET,
)
trainer.fit(module, data)
trainer.save_checkpoint(checkpoint)
state = module.full_draft_state()
if trainer.is_global_zero:
    torch.save(state, output)
leave_process_group()
