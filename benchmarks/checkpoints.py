"""What a checkpoint costs, against the steps between two of them.

`python -m benchmarks.checkpoints [--assets assets]` trains EAGLE3 drafts on features captured to disk before: one of the
tiny random target, and one of SmolLM2-135M as the quickstart trains it, if its files are in the assets folder. It saves
every few steps, and times saves and steps by themselves, so that a run with a checkpoint every 50 steps is compared with
one without at the same moment of the same machine. Wall time includes waiting for the disk and for other processes. It
never asserts a time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_dataflow as ldf
from lightning_dataflow.targets.hardware import multiplies_bfloat16
from lightning_dataflow.targets.tiny import write_tiny_conversations, write_tiny_target

EVERY = 50


def clocks() -> tuple[float, float]:
    """(wall, CPU) seconds."""
    return time.perf_counter(), time.process_time()


class Times(L.Callback):
    """(wall, CPU) seconds of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._step = clocks(), 0

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step != self._step:
            self._step, now = trainer.global_step, clocks()
            self.steps.append((now[0] - self._start[0], now[1] - self._start[1]))
            self._start = now


class TimedTrainer(ldf.DataFlowTrainer):
    """Times its saves, and takes them out of the steps."""

    def __init__(self, times: Times, **arguments: Any):
        super().__init__(**arguments)
        self.times, self.saves, self.num_bytes = times, [], 0

    def save_checkpoint(self, filepath: str | Path, *arguments: Any, **options: Any) -> None:
        start = clocks()
        super().save_checkpoint(filepath, *arguments, **options)
        now = clocks()
        self.saves.append((now[0] - start[0], now[1] - start[1]))
        self.times._start = tuple(a + b for a, b in zip(self.times._start, self.saves[-1], strict=True))
        self.num_bytes = os.path.getsize(filepath)


def measure(name: str, target: Path, prompt_file: Path, folder: Path, steps: int, saves: int, **sizes: Any) -> None:
    dtype = "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32"
    module = ldf.Eagle3Module(str(target), num_steps=4, **sizes)
    engine = ldf.HFTargetEngine(target, layer_ids=module.layer_ids, dtype=dtype, device="cpu")
    prompts, _ = ldf.load_prompts(str(prompt_file), ldf.load_tokenizer(target), max_length=512, num_samples=4 * steps)
    ldf.capture_to_folder(prompts, engine, folder / "features")
    data = ldf.DataFlowDataModule(ldf.OfflineSource(folder / "features"), global_batch_size=4, micro_batch_size=2)
    times = Times()
    trainer = TimedTrainer(
        times,
        accelerator="cpu",
        default_root_dir=folder,
        precision="bf16-mixed" if dtype == "bfloat16" else "32-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=2,
        limit_train_batches=2 * steps,
        gradient_clip_val=1.0,
        callbacks=[
            times,
            ModelCheckpoint(
                folder / "checkpoints", every_n_train_steps=steps // saves, monitor="step", mode="max", save_top_k=2
            ),
        ],
    )
    trainer.fit(module, data)
    step = [statistics.median(one) for one in zip(*times.steps[1:], strict=True)]
    save = [statistics.median(one) for one in zip(*trainer.saves, strict=True)]
    worst = max(wall for wall, _ in trainer.saves)
    shares = [100 * one / (EVERY * other) for one, other in zip(save, step, strict=True)]
    print(
        f"{name:12}{trainer.num_bytes / 1e6:9.1f}{1e3 * step[0]:11.0f}{1e3 * step[1]:9.0f}{1e3 * save[0]:13.0f}"
        f"{1e3 * save[1]:9.0f}{1e3 * worst:9.0f}{shares[0]:12.2f}{shares[1]:9.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the system's for temporary files")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(
        f"a checkpoint every {EVERY} steps of 4 samples; load of the machine before: {load:.1f} on {os.cpu_count()} cores"
    )
    print(f"{'':12}{'MB':>9}{'step, ms':>11}{'CPU':>9}{'save, ms':>13}{'CPU':>9}{'worst':>9}{'share, %':>12}{'CPU':>9}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        target = write_tiny_target(folder / "target")
        prompts = write_tiny_conversations(folder / "conversations.jsonl")
        measure("tiny", target, prompts, folder / "tiny", 20, 10, draft_vocab_size=256)
        smollm2 = options.assets / "smollm2-135m-instruct"
        if smollm2.is_dir():
            measure("SmolLM2", smollm2, options.assets / "sharegpt.jsonl", folder / "smollm2", 8, 4, draft_vocab_size=8192)


if __name__ == "__main__":
    main()
