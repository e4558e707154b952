"""Trains on what producer.py captures: `python train.py TARGET STEPS CONTROL MASTER [CLIENT]`."""

import sys

import lightning as L

import lightning_dataflow as ldf

target_path, steps, control, master, *client = sys.argv[1:]
plane = ldf.resolve_control_plane("disaggregated", "plain", path=control)
store = ldf.MooncakeFeatureStore("plain", master_address=master, client_address=client[0] if client else None)
data = ldf.DataFlowDataModule(ldf.StreamingSource(plane, store), global_batch_size=8, micro_batch_size=2)
module = ldf.Eagle3Module(target_path, layer_ids=[1, 3, 4], draft_vocab_size=256, num_steps=4, lr=1e-3)
accumulation = data.accumulate_grad_batches(world_size=1)
trainer = L.Trainer(
    accelerator="cpu",
    max_steps=int(steps),
    max_epochs=1,
    accumulate_grad_batches=accumulation,
    limit_train_batches=int(steps) * accumulation,
    log_every_n_steps=1,
)
trainer.fit(module, data)
