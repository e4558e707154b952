"""What the workers share: online data of the tiny target, a quiet Trainer's arguments, and FSDP1 on a CPU."""

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

import lightning_dataflow as ldf

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy on a CPU, but not a subclass; torch accepts a CPU that is named."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def online_data(module, target_path: str, prompt_file: str, global_batch_size: int) -> ldf.DataFlowDataModule:
    """What the module reads, captured in this process, in micro-batches of 2."""
    target = ldf.HFTargetEngine(target_path, layer_ids=module.layer_ids, dtype="float32", device="cpu")
    prompts, _ = ldf.load_prompts(prompt_file, ldf.load_tokenizer(target_path), max_length=128)
    source = ldf.OnlineSource(prompts, target)
    return ldf.DataFlowDataModule(source, global_batch_size=global_batch_size, micro_batch_size=2)
