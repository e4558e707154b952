"""An EAGLE3 draft with nothing but Lightning: train.py TARGET PROMPTS.jsonl STEPS."""

import sys

import lightning as L

import lightning_dataflow as ldf

target_path, prompt_file, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
module = ldf.Eagle3Module(target_path, draft_vocab_size=256, num_steps=4, lr=1e-3)
target = ldf.HFTargetEngine(target_path, layer_ids=module.layer_ids)
prompts, _ = ldf.load_prompts(prompt_file, ldf.load_tokenizer(target_path), max_length=256)
data = ldf.DataFlowDataModule(ldf.OnlineSource(prompts, target), global_batch_size=8, micro_batch_size=2)
accumulation = data.accumulate_grad_batches(world_size=1)
trainer = L.Trainer(
    max_steps=steps,
    max_epochs=1,
    accumulate_grad_batches=accumulation,
    limit_train_batches=steps * accumulation,
    gradient_clip_val=1.0,
)
trainer.fit(module, data)
