"""Step time and peak memory of each objective against a naive implementation of the same maths.

`python -m benchmarks.objectives` prints a table for SmolLM2-135M shapes, float32, 2 × 512 tokens, all positions
supervised: EAGLE3 with 7 steps and a draft vocabulary of 8,192; DFlash and Domino with 3 layers, 5 aux layers, 64 anchors
a sample, blocks of 16. Both sides run in turn in one process (time) and each in a process of its own (peak memory, of which
the memory before the step is taken off). `--scaling` prints how DFlash and Domino grow with anchors and with length. It
never asserts a time.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.naive_blocks import naive_dflash, naive_domino
from benchmarks.naive_eagle3 import naive_eagle3
from lightning_dataflow.contracts import StepContext
from lightning_dataflow.strategies.blocks.blocks import cut_blocks
from lightning_dataflow.strategies.blocks.network import BlockConfig, BlockDraft
from lightning_dataflow.strategies.dflash.objective import DFlashObjective
from lightning_dataflow.strategies.domino.network import DominoConfig, DominoDraft
from lightning_dataflow.strategies.domino.objective import DominoObjective
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.strategies.eagle3.objective import Eagle3Objective, supervised_positions

HIDDEN, VOCAB, DRAFT_VOCAB, STEPS, BATCH, LENGTH, ANCHORS = 576, 49152, 8192, 7, 2, 512, 64
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": VOCAB,
}
HALF_WAY = StepContext(global_step=25, total_steps=100)  # λ = 0.5
Step = Callable[[], Tensor]


def eagle3_steps(length: int, _: int) -> dict[str, Step]:
    """One forward and backward pass by name; both use the same weights and inputs."""
    config = Eagle3Config(**SIZES, draft_vocab_size=DRAFT_VOCAB)
    target_ids = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, target_ids, True)
    draft = Eagle3Draft(config)
    draft.set_target_ids(target_ids)
    embedding = torch.randn(VOCAB, HIDDEN) * 0.05
    # Rows outside the draft vocabulary are scaled down, so that the target's argmax is always inside it.
    head = torch.randn(VOCAB, HIDDEN) * torch.where(t2d, 0.05, 0.005)[:, None]
    input_ids = torch.randint(VOCAB, (BATCH, length))
    aux, last = torch.randn(BATCH, length, 3 * HIDDEN), torch.randn(BATCH, length, HIDDEN)
    loss_mask = torch.ones(BATCH, length)
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

    return both(draft, naive, ours)


def block_inputs(length: int, num_anchors: int) -> tuple[Tensor, ...]:
    """input_ids, aux, loss mask, anchors, embedding, head."""
    anchors = torch.stack([torch.randperm(length - 1)[:num_anchors].sort().values for _ in range(BATCH)])
    return (
        torch.randint(VOCAB, (BATCH, length)),
        torch.randn(BATCH, length, 5 * HIDDEN),
        torch.ones(BATCH, length),
        anchors,
        torch.randn(VOCAB, HIDDEN) * 0.05,
        torch.randn(VOCAB, HIDDEN) * 0.05,
    )


def dflash_steps(length: int, num_anchors: int) -> dict[str, Step]:
    """As `eagle3_steps`."""
    draft = BlockDraft(BlockConfig(**SIZES, num_layers=3, mask_token_id=VOCAB - 1))
    ids, aux, loss_mask, anchors, embedding, head = inputs = block_inputs(length, num_anchors)
    objective = DFlashObjective()

    def ours() -> Tensor:
        blocks = cut_blocks(ids, loss_mask, list(anchors), draft.config.block_size)
        sums = draft(aux, embedding, blocks, lambda hidden: objective(hidden, head, blocks))
        return sums.loss.numerator / sums.loss.denominator

    return both(draft, lambda: naive_dflash(draft, *inputs), ours)


def domino_steps(length: int, num_anchors: int) -> dict[str, Step]:
    """As `eagle3_steps`."""
    draft = DominoDraft(DominoConfig(**SIZES, num_layers=3, mask_token_id=VOCAB - 1))
    nn.init.normal_(draft.correction_weight, std=0.02)
    ids, aux, loss_mask, anchors, embedding, head = inputs = block_inputs(length, num_anchors)
    objective = DominoObjective()

    def ours() -> Tensor:
        blocks = cut_blocks(ids, loss_mask, list(anchors), draft.config.block_size)
        sums = draft(aux, embedding, blocks, lambda *scored: objective(*scored, head, blocks, HALF_WAY))
        return sums.loss.numerator / sums.loss.denominator

    return both(draft, lambda: naive_domino(draft, *inputs, objective.base_share(HALF_WAY)), ours)


def both(draft: nn.Module, naive: Step, ours: Step) -> dict[str, Step]:
    """Forward and backward pass of either loss."""

    def step(loss: Step) -> Step:
        def run() -> Tensor:
            draft.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            return value.detach()

        return run

    return {"naive": step(naive), "ours": step(ours)}


OBJECTIVES = {"EAGLE3": eagle3_steps, "DFlash": dflash_steps, "Domino": domino_steps}


def make_steps(objective: str, length: int = LENGTH, num_anchors: int = ANCHORS) -> dict[str, Step]:
    torch.manual_seed(0)
    return OBJECTIVES[objective](length, num_anchors)


def peak_memory(*what: object) -> float:
    """GB that one step needs beyond what was there before it, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.objectives", "--memory-of", *map(str, what)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(objective: str, side: str, length: str, num_anchors: str) -> None:
    step = make_steps(objective, int(length), int(num_anchors))[side]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = resident_kib("VmRSS")
    step()
    print((resident_kib("VmHWM") - before) / 2**20)


def resident_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def measure_seconds(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """In turn, after one step of each that does not count."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(objective: str, repeats: int) -> None:
    """One objective, naive and ours."""
    steps = make_steps(objective)
    losses = {name: step().item() for name, step in steps.items()}
    seconds = measure_seconds(steps, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {name: peak_memory(objective, name, LENGTH, ANCHORS) for name in steps}
    for name in steps:
        spread = f"({min(seconds[name]):.2f}-{max(seconds[name]):.2f})"
        print(f"{objective:8}{name:8}{losses[name]:12.6f}{median[name]:10.2f}{spread:>14}{memory[name]:9.2f}")
    ratio = median["ours"] / median["naive"]
    print(f"{objective:8}{'ratio':8}{'':12}{ratio:10.2f}{'':14}{memory['ours'] / memory['naive']:9.2f}", flush=True)


def scaling(objective: str, repeats: int) -> None:
    """Time and memory of ours with twice and four times the anchors, or the tokens."""
    for length, num_anchors in ((2048, 32), (2048, 64), (2048, 128), (1024, 64), (4096, 64)):
        ours = {"ours": make_steps(objective, length, num_anchors)["ours"]}
        seconds = statistics.median(measure_seconds(ours, repeats)["ours"])
        memory = peak_memory(objective, "ours", length, num_anchors)
        print(f"{objective:8}{length:8}{num_anchors:9}{seconds:10.2f}{memory:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=OBJECTIVES, action="append")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--memory-of", nargs=4, metavar=("OBJECTIVE", "SIDE", "LENGTH", "ANCHORS"))
    args = parser.parse_args()
    if args.memory_of:
        return measure_memory(*args.memory_of)
    print(f"{BATCH} samples, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.scaling:
        print(f"{'':8}{'length':>8}{'anchors':>9}{'seconds':>10}{'peak GB':>9}")
        for objective in args.only or ("DFlash", "Domino"):
            scaling(objective, args.repeats)
    else:
        print(f"{'':16}{'loss':>12}{'seconds':>10}{'(min-max)':>14}{'peak GB':>9}")
        for objective in args.only or OBJECTIVES:
            compare(objective, args.repeats)


if __name__ == "__main__":
    main()
