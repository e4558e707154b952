"""One step under FullyShardedDataParallel: fsdp1_worker.py TARGET PROMPTS CHECKPOINT OUTPUT. Saves a sharded checkpoint,
and, by rank 0, the draft's whole state; saving a full checkpoint on a CPU ended in SIGSEGV (torch 2.13.0).
"""

import sys

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

import lightning_dataflow as ldf
from lightning_dataflow.run.ranks import leave_process_group


class OnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy on a CPU, but not a subclass; torch accepts a CPU that is named."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


target_path, prompt_file, checkpoint, output = sys.argv[1:]
module = ldf.Eagle3Module(target_path, draft_vocab_size=96, num_steps=3)
target = ldf.HFTargetEngine(target_path, layer_ids=module.layer_ids, dtype="float32", device="cpu")
prompts, _ = ldf.load_prompts(prompt_file, ldf.load_tokenizer(target_path), max_length=128)
data = ldf.DataFlowDataModule(ldf.OnlineSource(prompts, target), global_batch_size=4, micro_batch_size=2)
trainer = ldf.DataFlowTrainer(
    accelerator="cpu",
    devices=2,
    strategy=OnCPU(auto_wrap_policy={type(module.draft)}, state_dict_type="sharded"),
    max_steps=1,
    max_epochs=1,
    limit_train_batches=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, data)
trainer.save_checkpoint(checkpoint)
state = module.full_draft_state()
if trainer.is_global_zero:
    torch.save(state, output)
leave_process_group()
