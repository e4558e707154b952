"""How much of the batches is padding, with and without packing, for conversations of real lengths.

python -m benchmarks.packing [conversations.jsonl] [target]
"""

import sys

from lightning_dataflow.data import Batching, PassOrder
from lightning_dataflow.prompts import load_prompts
from lightning_dataflow.targets import load_tokenizer

NUM_SAMPLES, NUM_PASSES, SAMPLES_AT_MOST = 2000, 4, 512
PACKED = ((1024, 8), (2048, 4), (2048, 8), (2048, 16), (4096, 8), (8192, 8))


def main(path: str = "assets/sharegpt.jsonl", target: str = "assets/smollm2-135m-instruct") -> None:
    """Print one table."""
    print("cut to | rows | padding | samples a step")
    for max_length in (512, 2048):
        prompts, _ = load_prompts(path, load_tokenizer(target), max_length=max_length, num_samples=NUM_SAMPLES)
        order = PassOrder(len(prompts), seed=0)
        lengths = [len(prompts[order.locate(seq)[0]].input_ids) for seq in range(NUM_PASSES * len(prompts))]
        for size in (2, 4, 8):
            batches = [lengths[start : start + size] for start in range(0, len(lengths) - size + 1, size)]
            positions = sum(size * max(batch) for batch in batches)
            print(f"{max_length} | {size} of one sample | {1 - sum(map(sum, batches)) / positions:.3f} | {size}")
        for row_tokens, rows in PACKED:
            if row_tokens >= max_length:
                padding, samples = packed(lengths, row_tokens, rows)
                print(f"{max_length} | {rows} of {row_tokens} tokens | {padding:.3f} | {samples:.1f}")


def packed(lengths: list[int], row_tokens: int, rows: int) -> tuple[float, float]:
    """(share of padding, samples a window)."""
    batching = Batching(global_batch_size=SAMPLES_AT_MOST, row_tokens=row_tokens, rows_per_step=rows)
    start = num_windows = 0
    while start + SAMPLES_AT_MOST <= len(lengths):
        start, num_windows = batching.window(start, lengths.__getitem__).seqs.stop, num_windows + 1
    return 1 - sum(lengths[:start]) / (num_windows * rows * row_tokens), start / num_windows


if __name__ == "__main__":
    main(*sys.argv[1:])
