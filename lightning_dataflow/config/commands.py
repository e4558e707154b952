"""Settings of single commands: `evaluate`, by which a training measures too, and `show-mask`."""

from dataclasses import dataclass
from typing import Any

from lightning_dataflow.config.fields import DTYPES, number, one_of


@dataclass
class EvaluateConfig:
    """Acceptance evaluation; see AcceptanceEvaluation, and docs/evaluation.md for the `evaluate` command.

    Attributes:
        num_draft_tokens: K; a block draft then decodes blocks of K + 1.
        every_n_steps: measure this often while training; 0 for before and after only.
        dtype: of the target while decoding.

    Of the `evaluate` command:
        checkpoint: a checkpoint, a run's folder for all of its checkpoints, or an exported folder.
        data: a JSONL file of prompts; null for the held-out ones of `data`.
        num_prompts: decode only this many; null for all.
        batch_size: prompts that are decoded at a time.
        baseline: also decode with the target alone, for the speed-up, and compare the outputs.
        backend: what decodes.
        python: Python of the environment in which vLLM is installed.
        vllm_args: further keyword arguments of `vllm.LLM`. Untyped: Hydra adds no keys to an empty dictionary.
        url: of an SGLang server that speculates.
        baseline_url: of an SGLang server without a draft.
        timeout_s: for a vLLM process, or an answer of a server.
        output: a JSON file, with a figure of the same name beside it; null prints only.
    """

    num_draft_tokens: int = number(4, at_least=1)
    max_new_tokens: int = number(32, at_least=1)
    every_n_steps: int = number(0, at_least=0)
    temperature: float = 0.0
    dtype: str = one_of(*DTYPES, default="float32")
    checkpoint: str | None = None
    data: str | None = None
    num_prompts: int | None = number(None, at_least=1)
    batch_size: int = number(1, at_least=1)
    baseline: bool = True
    backend: str = one_of("hf", "vllm", "sglang_server", default="hf")
    python: str | None = None
    vllm_args: Any = None
    url: str | None = None
    baseline_url: str | None = None
    timeout_s: float = number(3600.0, above=0)
    output: str | None = None


@dataclass
class ShowMaskConfig:
    """The `show-mask` command.

    Attributes:
        start, count: which records, from 0.
        colour: supervised text on green; without it, it stays between ⟦ and ⟧, as scripts read it.
        output: a file for the same as JSON: rows with line, turn, num_tokens, spans and reason.
    """

    start: int = number(0, at_least=0)
    count: int = number(3, at_least=0)
    colour: bool = True
    output: str | None = None
