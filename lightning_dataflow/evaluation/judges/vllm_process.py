"""Acceptance by vLLM, which decodes in an environment and a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.evaluation.acceptance import AcceptanceReport, check_decoding
from lightning_dataflow.services.leash import leashed_command

WORKER = Path(__file__).with_name("vllm_worker.py")
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process is ended more surely than several
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",  # modules beside the worker's file are none of its business
}
"""Set for the worker unless they are set already."""

LEAST_TEMPERATURE = 0.01
"""vLLM takes this for any that is lower and not 0."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What one vLLM process generated, and how far its `spec_decode` counters went on."""

    tokens: list[list[int]]
    seconds: float
    num_drafts: int
    num_draft_tokens: int
    accepted_per_position: list[int]
    version: str
    on_cpu: bool

    @property
    def num_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True, kw_only=True)
class VLLMDecoder:
    """How vLLM is started, and what it generates.

    Args:
        python: of the environment in which vLLM is installed.
        target: a Hugging Face folder.
        dtype: of target and draft.
        folder: for the logs, `vllm.log` and `vllm-plain.log`.
        max_new_tokens, temperature, seed: of sampling.
        stop_token_ids: the target's end tokens.
        batch_size: the most sequences that vLLM decodes at a time.
        engine_args: further keyword arguments of `vllm.LLM`.
        timeout_s: for one process to start and decode all prompts.

    Raises:
        UserError: a setting out of range.
    """

    python: str
    target: str
    dtype: str
    folder: Path
    max_new_tokens: int
    stop_token_ids: Sequence[int]
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 1
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_decoding(max_new_tokens=self.max_new_tokens, temperature=self.temperature, batch_size=self.batch_size)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"evaluate.temperature={self.temperature}: vLLM would decode at {LEAST_TEMPERATURE}, use that or more, or "
                "0 for greedy decoding"
            )

    def decode(
        self, prompts: Sequence[Sequence[int]], *, num_draft_tokens: int = 0, speculation: Mapping[str, Any] | None = None
    ) -> Decoded:
        """Decode every prompt, in a process that starts for it; with the target alone unless it is told how to speculate.

        Raises:
            UserError: vLLM refuses; its log says more.
            PeerTimeoutError: it took longer than `timeout_s`.
            PeerFailedError: the process died.
        """
        engine: dict[str, Any] = {
            "model": self.target,
            "dtype": self.dtype,
            "max_num_seqs": self.batch_size,
            "max_model_len": max(map(len, prompts)) + self.max_new_tokens + room_for(num_draft_tokens),
            "disable_log_stats": False,
            "enable_prefix_caching": False,  # a prompt that is in the cache but for its last token is counted as a draft
            "skip_tokenizer_init": True,
            "seed": self.seed,
        }
        if speculation is not None:
            engine["speculative_config"] = {**speculation, "num_speculative_tokens": num_draft_tokens}
        job = {
            "engine": engine | dict(self.engine_args),
            "prompts": [list(prompt) for prompt in prompts],
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stop_token_ids": list(self.stop_token_ids),
        }
        return Decoded(**self._run(job, "vllm-plain.log" if speculation is None else "vllm.log"))

    def evaluate(
        self,
        draft: str,
        method: str,
        prompts: Sequence[Sequence[int]],
        *,
        num_draft_tokens: int,
        cpu_caveat: str | None = None,
        plain: Decoded | None = None,
    ) -> AcceptanceReport:
        """Decode every prompt with a draft and read vLLM's counters. Raises as `decode`.

        Args:
            draft: a folder that vLLM reads.
            method: vLLM's name of the algorithm.
            cpu_caveat: a warning if vLLM runs on a CPU.
            plain: the same prompts by the target alone, for the speed-up, and at temperature 0 to compare.
        """
        speculation = {"method": method, "model": draft}
        if self.temperature > 0:
            speculation["draft_sample_method"] = "probabilistic"  # our rule; otherwise vLLM's drafts are greedy
        found = self.decode(prompts, num_draft_tokens=num_draft_tokens, speculation=speculation)
        if found.num_draft_tokens != found.num_drafts * num_draft_tokens:
            raise PeerFailedError(
                f"vLLM proposed {found.num_draft_tokens} tokens in {found.num_drafts} drafts, not {num_draft_tokens} in "
                "each: its counts are not comparable"
            )
        if cpu_caveat is not None and found.on_cpu:
            print(f"warning: {cpu_caveat}", flush=True)
        identical = None
        if plain is not None and self.temperature == 0:
            identical = sum(one == other for one, other in zip(found.tokens, plain.tokens, strict=True))
        return AcceptanceReport(
            backend="vllm",
            num_prompts=len(prompts),
            num_tokens=found.num_tokens,
            num_drafts=found.num_drafts,
            accepted_per_position=tuple(found.accepted_per_position),
            seconds=found.seconds,
            plain_tokens=plain.num_tokens if plain is not None else None,
            plain_seconds=plain.seconds if plain is not None else None,
            num_identical=identical,
        )

    def _run(self, job: dict[str, Any], log_name: str) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / log_name
        print(f"vLLM starts, {log}", flush=True)
        with tempfile.TemporaryDirectory(prefix="lightning-dataflow-") as folder, log.open("w") as output:
            paths = [Path(folder) / name for name in ("job.json", "result.json")]
            paths[0].write_text(json.dumps(job))
            command = leashed_command([self.python, str(WORKER), *map(str, paths)], signal.SIGKILL)
            process = subprocess.Popen(
                command,
                env=VARIABLES | os.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                raise PeerTimeoutError(
                    f"vLLM has not decoded all prompts within {self.timeout_s:g} s: see {log}, or raise evaluate.timeout_s"
                ) from None
            finally:
                _end(process)
            if not paths[1].is_file():
                raise PeerFailedError(f"vLLM ended with status {status} and no result: see {log}")
            result = json.loads(paths[1].read_text())
        if "error" in result:
            raise UserError(f"vLLM: {result['error']} (see {log})")
        return result


def room_for(num_draft_tokens: int) -> int:
    """Positions behind the last token without which vLLM 0.32 proposes token 0 in the last drafts: a proposal that is being
    verified, and one more."""
    return 2 * (num_draft_tokens + 1)


def find_python(path: str | None) -> str:
    """The Python to run vLLM with. Raises UserError unless it exists and has vLLM."""
    if path is None:
        raise UserError("backend vllm needs the Python of an environment with vLLM: set evaluate.python=…/bin/python")
    if not os.access(path, os.X_OK) or Path(path).is_dir():
        raise UserError(f"evaluate.python={path} is no executable: give the Python of an environment with vLLM")
    code = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('vllm') else 3)"
    try:
        asked = subprocess.run([path, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"evaluate.python={path} does not run ({error})") from error
    if asked.returncode:
        raise UserError(f"evaluate.python={path} has no vLLM: install it there (scripts/vllm_cpu.sh builds one for CPUs)")
    return str(Path(path).absolute())


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
