"""Decodes prompts with vLLM: `python vllm_worker.py JOB RESULT`, two JSON files.

Runs in an environment of vLLM's own: it imports the standard library and vLLM, and nothing of this package.

The job:
    engine: keyword arguments of `vllm.LLM`, with its `speculative_config` unless the target decodes alone.
    prompts: token ids of each.
    max_new_tokens, temperature, seed, stop_token_ids: of sampling.
The result:
    tokens: generated ids of each prompt.
    seconds: of decoding all of them, without start and warm-up.
    num_drafts, num_draft_tokens, accepted_per_position: by how much vLLM's `spec_decode` counters grew; 0 and empty without
        a draft.
    on_cpu: whether it ran on a CPU.
    error: one line, in place of all of these.
"""

import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COUNTERS = "vllm:spec_decode_"
CPU_SAMPLES = (
    "on a CPU, vLLM 0.32 verifies proposals at a temperature that it never writes (its expand kernel of floats), so counts "
    "above 0 mean nothing: set evaluate.temperature=0, or evaluate.backend=hf, or use a GPU"
)


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job."""
    import vllm
    from vllm.platforms import current_platform

    engine = job["engine"]
    if current_platform.is_cpu():
        if job["temperature"]:  # also without a draft, or the baseline would be decoded in vain
            raise ValueError(CPU_SAMPLES)
        engine = {"enforce_eager": True, **engine}  # compiling costs minutes there
    llm = vllm.LLM(**engine)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def sampling(index: int, max_tokens: int) -> Any:
        return vllm.SamplingParams(
            max_tokens=max_tokens,
            temperature=job["temperature"],
            seed=job["seed"] + index if job["temperature"] else None,
            ignore_eos=True,  # only the given tokens end an output
            stop_token_ids=job["stop_token_ids"],
            detokenize=False,
        )

    llm.generate(prompts[:1], sampling(0, min(8, job["max_new_tokens"])), use_tqdm=False)  # warm-up; not timed
    each = [sampling(index, job["max_new_tokens"]) for index in range(len(prompts))]
    before = _counts(llm)
    tokens: list[list[int]] = [[] for _ in prompts]
    start = time.perf_counter()
    for chosen in rounds([len(ids) for ids in job["prompts"]], engine["max_num_seqs"]):
        outputs = llm.generate([prompts[index] for index in chosen], [each[index] for index in chosen], use_tqdm=False)
        for index, output in zip(chosen, outputs, strict=True):
            tokens[index] = list(output.outputs[0].token_ids)
    seconds = time.perf_counter() - start
    growth = [new - old for new, old in zip(_counts(llm), before, strict=True)]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "num_drafts": growth[0],
        "num_draft_tokens": growth[1],
        "accepted_per_position": growth[2:],
        "on_cpu": current_platform.is_cpu(),
    }


def rounds(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the prompts that vLLM gets together, by their lengths.

    A prompt of one token that joins while others decode looks like one of them to vLLM 0.32's scheduler, which pads it to
    the length of a verification and counts that as a draft with nothing accepted. So these decode first, in batches that
    begin together; all others share a round.
    """
    single = [index for index, length in enumerate(lengths) if length == 1]
    others = [index for index, length in enumerate(lengths) if length != 1]
    batches = [single[first : first + batch_size] for first in range(0, len(single), batch_size)]
    return [*batches, others] if others else batches


def _counts(llm: Any) -> list[int]:
    """Drafts, their tokens, and the accepted tokens of each position so far; without speculation, only two zeros."""
    metrics = {metric.name.removeprefix(COUNTERS): metric for metric in llm.get_metrics()}
    if "num_drafts" not in metrics:
        return [0, 0]
    per_position = metrics["num_accepted_tokens_per_pos"].values
    return [metrics["num_drafts"].value, metrics["num_draft_tokens"].value, *per_position]


def main() -> None:
    """Run the job. The traceback of a failure goes to the log, its last line into the result."""
    job, result = (Path(path) for path in sys.argv[1:3])
    try:
        answer = decode(json.loads(job.read_text()))
    except Exception as error:
        traceback.print_exc()
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    result.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
