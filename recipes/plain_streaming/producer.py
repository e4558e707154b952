"""Captures prompts for trainers anywhere on this machine: `python producer.py TARGET PROMPTS CONTROL MASTER [CLIENT]`."""

import os
import signal
import sys

import lightning_dataflow as ldf

signal.signal(signal.SIGTERM, signal.default_int_handler)  # gives its leases back, as with Ctrl-C
target_path, prompts_path, control, master, *client = sys.argv[1:]
plane = ldf.resolve_control_plane("disaggregated", "plain", path=control)
store = ldf.MooncakeFeatureStore("plain", master_address=master, client_address=client[0] if client else None)
prompts, _ = ldf.load_prompts(prompts_path, ldf.load_tokenizer(target_path), max_length=256)
target = ldf.HFTargetEngine(target_path, layer_ids=(1, 3, 4))
feed = ldf.PromptFeed(prompts, target, seed=0, run_id="plain")
marks = ldf.Watermarks(high_bytes=100_000_000, low_bytes=75_000_000, high_refs=1000, low_refs=750)
ldf.RolloutWorker(f"producer-{os.getpid()}", feed, plane, store, marks).run()
