"""What decodes for the `evaluate` command, by `evaluate.backend`."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from lightning_dataflow.config.files import read_api_key
from lightning_dataflow.contracts import UserError
from lightning_dataflow.evaluation.acceptance import AcceptanceReport, Decoded, Decoding, evaluate_acceptance
from lightning_dataflow.evaluation.judges.sglang_server import SGLangDecoder
from lightning_dataflow.evaluation.judges.vllm_process import VLLMDecoder, find_python, room_for
from lightning_dataflow.evaluation.loop import check_num_draft_tokens
from lightning_dataflow.export.export import export_draft
from lightning_dataflow.export.serve import check_engine
from lightning_dataflow.strategies.checkpoint import load_module
from lightning_dataflow.strategies.published.engines import VLLM
from lightning_dataflow.strategies.published.reading import is_published, read_draft
from lightning_dataflow.targets.info import read_eos_token_ids

if TYPE_CHECKING:
    from lightning_dataflow.run.builder import Builder


class Judge(Protocol):
    """Measures drafts one after the other. Raises UserError where a setting is missing that it needs.

    Attributes:
        unused: settings of `evaluate`, and `seed`, that it does not use.
        room: positions of the target behind the last token of an output, for proposals.
    """

    unused: ClassVar[tuple[str, ...]]
    room: int

    def measure(self, draft: Path, prompts: Sequence[Sequence[int]]) -> AcceptanceReport:
        """Decode every prompt with a draft."""


class HFJudge(Judge):
    """This package, with the target in transformers."""

    unused = ("python", "vllm_args", "url", "baseline_url", "timeout_s")

    def __init__(self, parts: "Builder", decoding: Decoding):
        self.parts = parts
        self.decoding = decoding
        self.room = parts.config.evaluate.num_draft_tokens

    def measure(self, draft: Path, prompts: Sequence[Sequence[int]]) -> AcceptanceReport:
        config, options = self.parts.config, self.parts.config.evaluate
        module = load_module(draft, target=config.target.path)
        target = self.parts.evaluation_target
        target.set_capture_layers(module.layer_ids)
        module.load_frozen_target(target.device)
        return evaluate_acceptance(
            target,
            module.to(target.device).drafter(num_draft_tokens=options.num_draft_tokens),
            prompts,
            self.decoding,
            baseline=options.baseline,
            progress=lambda done, total: print(f"\rdecoded {done}/{total}", end="\n" * (done == total), flush=True),
        )


class VLLMJudge(Judge):
    """vLLM, in an environment of its own. A draft that is no folder for vLLM is exported to a temporary one."""

    unused = ("url", "baseline_url")

    def __init__(self, parts: "Builder", decoding: Decoding):
        config, options = parts.config, parts.config.evaluate
        if not isinstance(options.vllm_args, dict | None):
            raise UserError(
                f"evaluate.vllm_args={options.vllm_args}: give arguments of vllm.LLM, such as {{max_model_len: 2048}}"
            )
        self.config = config
        self.room = room_for(options.num_draft_tokens)
        self.plain: Decoded | None = None
        self.decoder = VLLMDecoder(
            python=find_python(options.python),
            target=str(Path(config.target.path).absolute()),
            dtype=options.dtype,
            folder=Path(config.run_dir),
            decoding=decoding,
            stop_token_ids=read_eos_token_ids(config.target.path),
            engine_args=options.vllm_args or {},
            timeout_s=options.timeout_s,
        )

    def measure(self, draft: Path, prompts: Sequence[Sequence[int]]) -> AcceptanceReport:
        num_draft_tokens = self.config.evaluate.num_draft_tokens
        with self._folder(draft) as folder:
            published = read_draft(folder)
            export = check_engine(published.strategy, VLLM)
            if (block_size := published.network.get("block_size")) is not None:
                check_num_draft_tokens(num_draft_tokens, block_size)
            if self.config.evaluate.baseline and self.plain is None:
                self.plain = self.decoder.decode(prompts)
            method, model = export.served_as["vllm"], str(folder.absolute())
            speculation = {"method": method, "model": model, "num_speculative_tokens": num_draft_tokens}
            drafted = self.decoder.decode(prompts, speculation, cpu_caveat=export.cpu_caveat(published.network))
            return drafted.report("vllm", self.plain, temperature=self.decoder.decoding.temperature)

    @contextmanager
    def _folder(self, draft: Path) -> Iterator[Path]:
        """A folder that vLLM reads. Raises UserError for a damaged draft, or one of another target: vLLM may not notice."""
        target = self.config.target.path
        if is_published(draft) and read_draft(draft).format in ("vllm", "speculators"):
            load_module(draft, target=target)
            yield draft
            return
        run_dir = Path(self.config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".exported-", dir=run_dir) as folder:  # this disk has room for checkpoints
            yield export_draft(draft, Path(folder) / "draft", engine="vllm", dtype="float32", target=target)


class SGLangJudge(Judge):
    """A running SGLang server. It was started with its draft, K and dtype, and its random draws follow no seed of ours."""

    unused = ("checkpoint", "num_draft_tokens", "dtype", "baseline", "seed", "python", "vllm_args")

    def __init__(self, parts: "Builder", decoding: Decoding):
        config, options = parts.config, parts.config.evaluate
        if options.url is None:
            raise UserError("backend sglang_server needs a server that speculates: set evaluate.url=http://HOST:PORT")
        key = read_api_key(config.target)
        self.decoding = decoding
        self.decoder = SGLangDecoder(url=options.url, api_key=key, timeout_s=options.timeout_s)
        self.plain = None
        if options.baseline_url is not None:
            self.plain = SGLangDecoder(url=options.baseline_url, api_key=key, timeout_s=options.timeout_s)
        self.stop_token_ids = read_eos_token_ids(config.target.path)
        self.room = self.decoder.num_draft_tokens()  # `measure` refuses a server without a draft

    def measure(self, draft: Path, prompts: Sequence[Sequence[int]]) -> AcceptanceReport:
        return self.decoder.evaluate(prompts, self.decoding, stop_token_ids=self.stop_token_ids, plain=self.plain)


JUDGES: dict[str, Callable[["Builder", Decoding], Judge]] = {
    "hf": HFJudge,
    "vllm": VLLMJudge,
    "sglang_server": SGLangJudge,
}
