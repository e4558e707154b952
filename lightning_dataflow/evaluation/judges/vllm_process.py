"""Acceptance by vLLM, which decodes in an environment and a process of its own."""

import json
import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.contracts.foreign import without_advice
from lightning_dataflow.evaluation.acceptance import Decoded, Decoding
from lightning_dataflow.services.server import end_process, start_process

log = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("vllm_worker.py")
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process is easier to end than several
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",  # or it would import modules that lie beside its file
}
"""Set for the worker unless they are set already."""

LEAST_TEMPERATURE = 0.01
"""vLLM raises any lower temperature but 0 to this."""
STOP_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class VLLMDecoder:
    """Decodes with vLLM, which runs in another environment.

    Args:
        python: of the environment in which vLLM is installed.
        target: a Hugging Face folder.
        dtype: of target and draft.
        folder: for the logs, `vllm.log` and `vllm-plain.log`.
        stop_token_ids: the target's end tokens.
        engine_args: further keyword arguments of `vllm.LLM`.
        timeout_s: for one process to start and decode all prompts.

    Raises:
        UserError: a setting out of range.
    """

    python: str
    target: str
    dtype: str
    folder: Path
    decoding: Decoding
    stop_token_ids: Sequence[int]
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if 0 < (temperature := self.decoding.temperature) < LEAST_TEMPERATURE:
            raise UserError(
                f"evaluate.temperature={temperature}: vLLM would decode at {LEAST_TEMPERATURE}, use that or more, or "
                "0 for greedy decoding"
            )

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        speculation: Mapping[str, Any] | None = None,
        *,
        cpu_caveat: str | None = None,
    ) -> Decoded:
        """Decode every prompt in a new vLLM process.

        Args:
            speculation: for vLLM's `speculative_config`: `method`, its name of the algorithm; `model`, the draft's folder;
                and `num_speculative_tokens`. None to decode with the target alone.
            cpu_caveat: a warning if vLLM runs on a CPU.

        Raises:
            UserError: vLLM refuses; its log says more.
            PeerTimeoutError: it took longer than `timeout_s`.
            PeerFailedError: the process died, or its counts cannot be compared.
        """
        num_draft_tokens = 0 if speculation is None else speculation["num_speculative_tokens"]
        engine: dict[str, Any] = {
            "model": self.target,
            "dtype": self.dtype,
            "max_num_seqs": self.decoding.batch_size,
            "max_model_len": max(map(len, prompts)) + self.decoding.max_new_tokens + room_for(num_draft_tokens),
            "disable_log_stats": False,
            "enable_prefix_caching": False,  # a prompt cached up to its last token would be counted as a draft
            "skip_tokenizer_init": True,
            "seed": self.decoding.seed,
        }
        if speculation is not None:
            by_default = {"draft_sample_method": "probabilistic"}  # as `hf` does; vLLM's own default is greedy
            engine["speculative_config"] = (by_default if self.decoding.temperature > 0 else {}) | dict(speculation)
        job = {
            "engine": engine | dict(self.engine_args),
            "prompts": [list(prompt) for prompt in prompts],
            "max_new_tokens": self.decoding.max_new_tokens,
            "temperature": self.decoding.temperature,
            "seed": self.decoding.seed,
            "stop_token_ids": list(self.stop_token_ids),
        }
        result = self._run(job, self.folder / ("vllm-plain.log" if speculation is None else "vllm.log"))
        num_drafts, proposed = result["num_drafts"], result.pop("num_draft_tokens")
        if proposed != num_drafts * num_draft_tokens:
            raise PeerFailedError(
                f"vLLM proposed {proposed} tokens in {num_drafts} drafts, not {num_draft_tokens} in each: its counts "
                "cannot be compared"
            )
        if result.pop("on_cpu") and cpu_caveat is not None:
            log.warning(cpu_caveat)
        return Decoded(**result)

    def _run(self, job: dict[str, Any], log_file: Path) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        log.info("vLLM starts, %s", log_file)
        with tempfile.TemporaryDirectory(prefix="lightning-dataflow-") as folder, log_file.open("w") as output:
            job_file, result_file = (Path(folder) / name for name in ("job.json", "result.json"))
            job_file.write_text(json.dumps(job))
            command = [self.python, str(WORKER), str(job_file), str(result_file)]
            variables = VARIABLES | os.environ
            process = start_process(command, signal.SIGKILL, stdin=subprocess.DEVNULL, stdout=output, env=variables)
            try:
                status = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                raise PeerTimeoutError(
                    f"vLLM has not decoded all prompts within {self.timeout_s:g} s: see {log_file}, or raise "
                    "evaluate.timeout_s"
                ) from None
            finally:
                end_process(process, STOP_TIMEOUT_S)
            if not result_file.is_file():
                raise PeerFailedError(f"vLLM ended with status {status} and no result: see {log_file}")
            result: dict[str, Any] = json.loads(result_file.read_text())
        if "error" in result:
            raise UserError(f"vLLM: {without_advice(str(result['error']))} (see {log_file})")
        return result


def room_for(num_draft_tokens: int) -> int:
    """Positions that vLLM 0.32 needs behind the last token: the proposal being verified, and one more. With fewer, its last
    drafts propose token 0."""
    return 2 * (num_draft_tokens + 1)


def find_python(path: str | None) -> str:
    """The Python to run vLLM with. Raises UserError unless it exists and has vLLM."""
    if path is None:
        raise UserError("backend vllm needs the Python of an environment with vLLM: set evaluate.python=…/bin/python")
    program = str(Path(path).absolute())
    code = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('vllm') else 3)"
    try:
        probe = subprocess.run([program, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"evaluate.python={path} does not run ({error}): give a Python with vLLM") from error
    if probe.returncode:
        raise UserError(f"evaluate.python={path} has no vLLM: install it there (scripts/vllm_cpu.sh builds one for CPUs)")
    return program
