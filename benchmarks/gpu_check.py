"""One training step of each strategy on a GPU against the CPU's numbers, as a Markdown table.

`python -m benchmarks.gpu_check` needs torch, safetensors and a CUDA device, and no network. A row is a draft, a length,
heads and key-value heads, samples alone in their rows or packed, and a precision. Errors are max |a − b| / max |b| against
float32 on the CPU, of the loss and of the worst gradient; the time is the median of five steps after the first, which
compiles. Ends with status 1 when an error is above its limit. `--device cpu --small` runs anywhere.
"""

import argparse
import copy
import itertools
import math
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_dataflow.contracts import StepContext
from lightning_dataflow.strategies.blocks.blocks import Span, cut_blocks
from lightning_dataflow.strategies.blocks.labels import BlockLabels
from lightning_dataflow.strategies.blocks.network import BlockConfig, BlockDraft
from lightning_dataflow.strategies.dflash.objective import DFlashObjective
from lightning_dataflow.strategies.domino.network import DominoConfig, DominoDraft
from lightning_dataflow.strategies.domino.objective import DominoObjective
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.strategies.eagle3.objective import Eagle3Objective, supervised_positions

FULL = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 64, "vocab_size": 32000, "num_aux_layers": 5}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 500, "num_aux_layers": 5}
SHAPES = ((40, (16, 4)), (40, (9, 3)), (700, (16, 4)))
"""Tokens, and heads with their key-value heads."""
BATCH, UNROLLED = 2, 7
LIMITS = {"float32": (1e-4, 1e-3), "bf16-mixed": (1e-2, 1e-1)}
"""Largest errors of the loss and of a gradient."""
COLUMNS = ("strategy", "tokens", "heads", "rows", "precision", "loss", "error", "gradient error", "ms a step", "peak MB")


def corrected(draft: DominoDraft) -> DominoDraft:
    """A new draft corrects nothing, which leaves its GRU without a gradient to compare."""
    nn.init.normal_(draft.correction_weight, std=0.1)
    return draft


DRAFTS = {
    "eagle3": lambda sizes: Eagle3Draft(Eagle3Config(**sizes, draft_vocab_size=sizes["vocab_size"] // 4)),
    "dflash": lambda sizes: BlockDraft(BlockConfig(**sizes, num_layers=2, mask_token_id=3)),
    "domino": lambda sizes: corrected(DominoDraft(DominoConfig(**sizes, num_layers=2, mask_token_id=3))),
}


def inputs(sizes: dict[str, int], length: int, packed: bool) -> dict[str, Any]:
    """A batch of random features; packed rows hold two samples each."""
    hidden, vocab, cut = sizes["hidden_size"], sizes["vocab_size"], length // 3
    ends = [(0, cut), (cut, length)] if packed else [(0, length)]
    spans = [Span(row, *end) for row in range(BATCH) for end in ends]
    position = torch.cat([torch.arange(stop - start) for start, stop in ends]).expand(BATCH, length).contiguous()
    ids, mask = torch.randint(vocab, (BATCH, length)), torch.ones(BATCH, length)
    anchors = [torch.randperm(span.stop - span.start - 1)[:32].sort().values for span in spans]
    blocks = cut_blocks(ids, mask, anchors, 16, spans)
    return {
        "ids": ids,
        "position": position if packed else None,
        "aux": torch.randn(BATCH, length, sizes["num_aux_layers"] * hidden),
        "last": torch.randn(BATCH, length, hidden),
        "embedding": torch.randn(vocab, hidden) * 0.05,
        "head": torch.randn(vocab, hidden) * 0.05,
        "target_rows": supervised_positions(mask, position),
        "blocks": blocks,
        "label_rows": BlockLabels.of(blocks).rows,
    }


def step(draft: nn.Module, x: dict[str, Any], precision: str) -> dict[str, Tensor]:
    """The loss and every gradient of one step."""

    def score(*scored: Tensor) -> Any:
        if isinstance(draft, Eagle3Draft):
            teacher = {"last_hidden_state": x["last"], "target_head": x["head"], "rows": x["target_rows"]}
            return Eagle3Objective()(*scored, target_ids=draft.target_ids, t2d=draft.t2d, **teacher)
        if isinstance(draft, DominoDraft):
            half_way = StepContext(global_step=25, total_steps=100)
            return DominoObjective()(*scored, x["head"], x["blocks"], half_way, x["label_rows"])
        return DFlashObjective()(*scored, x["head"], x["blocks"], rows=x["label_rows"])

    draft.zero_grad()
    with torch.autocast(x["ids"].device.type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
        if isinstance(draft, Eagle3Draft):
            sums = draft(x["ids"], x["aux"], x["embedding"], UNROLLED, score, position=x["position"])
        else:
            sums = draft(x["aux"], x["embedding"], x["blocks"], score, position=x["position"])
    loss = sums.loss.numerator / sums.loss.denominator
    loss.backward()
    return {"loss": loss.detach()} | {name: weight.grad for name, weight in draft.named_parameters()}


def timed(draft: nn.Module, x: dict[str, Any], precision: str) -> tuple[float, str]:
    """Milliseconds of a step, and megabytes at its peak where the device tells."""
    on_gpu, times = x["ids"].is_cuda, []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        start = time.perf_counter()
        step(draft, x, precision)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), f"{torch.cuda.max_memory_allocated() / 1e6:.0f}" if on_gpu else ""


def check(name: str, shape: tuple[int, tuple[int, int]], packed: bool, sizes: dict[str, int], device: str) -> bool:
    """Print a row for each precision. Returns whether all errors are within their limits."""
    torch.compiler.reset()  # a run trains one draft; several share Dynamo's limit of compilations
    torch.manual_seed(0)
    length, (heads, kv_heads) = shape
    draft = DRAFTS[name](sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads})
    batch, all_within = inputs(sizes, length, packed), True
    expected = step(draft, batch, "float32")
    draft_there, batch_there = copy.deepcopy(draft).to(device), tree_map(lambda x: x if x is None else x.to(device), batch)
    for precision, (loss_limit, gradient_limit) in LIMITS.items():
        actual = step(draft_there, batch_there, precision)
        errors = {
            key: ((actual[key].cpu() - value).abs().max() / value.abs().max()).item() for key, value in expected.items()
        }
        loss_error = errors.pop("loss")
        gradient_error = max(errors.values(), key=lambda error: math.inf if math.isnan(error) else error)
        within = loss_error <= loss_limit and gradient_error <= gradient_limit  # false for NaN
        elapsed, peak = timed(draft_there, batch_there, precision)
        row = (
            f"{name} | {length} | {heads}/{kv_heads} | {'packed' if packed else 'one sample'} | {precision} "
            f"| {actual['loss'].item():.4f} | {loss_error:.1e} | {gradient_error:.1e}{'' if within else ' **too large**'} "
            f"| {elapsed:.1f} | {peak}"
        )
        print(f"| {row} |", flush=True)
        all_within &= within
    return all_within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="sizes that a CPU computes in seconds")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: there is no CUDA device, use --device cpu --small")
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    cases = itertools.product(DRAFTS, SHAPES, (False, True))
    results = [check(*case, SMALL if options.small else FULL, options.device) for case in cases]
    limits = "; ".join(
        f"{name}: {loss:.0e} of the loss, {gradient:.0e} of a gradient" for name, (loss, gradient) in LIMITS.items()
    )
    print(f"\n{sum(results)} of {len(results)} cases are within the limits ({limits})")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
