"""Step time and peak memory of each objective against a naive implementation of the same maths.

`python -m benchmarks.objectives` prints one table for SmolLM2-135M shapes, float32, 2 × 512 tokens, all positions
supervised. Both sides run in turn in one process (time) and each in a process of its own (peak memory, of which the
memory before the step is taken off). It never asserts a time.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.naive_eagle3 import naive_eagle3
from lightning_dataflow.models import DraftVocab, Eagle3Config, Eagle3Draft
from lightning_dataflow.objectives import Eagle3Objective, supervised_positions

HIDDEN, VOCAB, DRAFT_VOCAB, STEPS, BATCH, LENGTH = 576, 49152, 8192, 7, 2, 512
Step = Callable[[], Tensor]


def eagle3_steps() -> dict[str, Step]:
    """One forward and backward pass by name; both use the same weights and inputs."""
    torch.manual_seed(0)
    config = Eagle3Config(
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        target_hidden_size=HIDDEN,
    )
    target_ids = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, target_ids, True)
    draft = Eagle3Draft(config, DraftVocab(d2t=target_ids - torch.arange(DRAFT_VOCAB), t2d=t2d))
    embedding = torch.randn(VOCAB, HIDDEN) * 0.05
    # Rows outside the draft vocabulary are scaled down, so that the target's argmax is always inside it.
    head = torch.randn(VOCAB, HIDDEN) * torch.where(t2d, 0.05, 0.005)[:, None]
    input_ids = torch.randint(VOCAB, (BATCH, LENGTH))
    aux, last = torch.randn(BATCH, LENGTH, 3 * HIDDEN), torch.randn(BATCH, LENGTH, HIDDEN)
    loss_mask = torch.ones(BATCH, LENGTH)
    objective = Eagle3Objective()

    def naive() -> Tensor:
        return naive_eagle3(draft, input_ids, aux, last, loss_mask, embedding, head, STEPS)[0]

    def ours() -> Tensor:
        shifted = torch.cat((input_ids[:, 1:], input_ids[:, :1]), 1)
        sums = draft(
            shifted,
            aux,
            embedding,
            STEPS,
            lambda hidden, lm_head: objective(
                hidden,
                lm_head,
                last_hidden_state=last,
                target_head=head,
                target_ids=target_ids,
                t2d=t2d,
                rows=supervised_positions(loss_mask),
            ),
        )
        return sums.loss.numerator / sums.loss.denominator

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> Tensor:
            draft.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            return value.detach()

        return run

    return {"naive": step(naive), "ours": step(ours)}


def peak_memory(name: str) -> float:
    """GB that one step of `name` needs beyond what was there before it, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.objectives", "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(name: str) -> None:
    step = eagle3_steps()[name]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = resident_kib("VmRSS")
    step()
    print((resident_kib("VmHWM") - before) / 2**20)


def resident_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=("naive", "ours"))
    args = parser.parse_args()
    if args.memory_of:
        return measure_memory(args.memory_of)
    steps = eagle3_steps()
    losses = {name: step().item() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {name: peak_memory(name) for name in steps}
    print(f"EAGLE3, {BATCH} x {LENGTH} tokens, {STEPS} steps, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':8}{'loss':>12}{'seconds':>10}{'(min-max)':>14}{'peak GB':>9}")
    for name in steps:
        spread = f"({min(seconds[name]):.2f}-{max(seconds[name]):.2f})"
        print(f"{name:8}{losses[name]:12.6f}{median[name]:10.2f}{spread:>14}{memory[name]:9.2f}")
    print(f"{'ratio':8}{'':12}{median['ours'] / median['naive']:10.2f}{'':14}{memory['ours'] / memory['naive']:9.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"(peak of this process, both sides: {peak:.1f} GB)")


if __name__ == "__main__":
    main()
