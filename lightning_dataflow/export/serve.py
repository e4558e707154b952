"""Whether an engine serves a draft, and the shell command that does it."""

import json
from shlex import quote

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.published.contract import DraftDescription, DraftExport
from lightning_dataflow.strategies.published.engines import SGLANG, SPECULATORS, Engine
from lightning_dataflow.strategies.registry import available_strategies, resolve_strategy


def check_engine(strategy: str, engine: Engine) -> DraftExport:
    """How a strategy's drafts are written. Raises UserError when the engine serves none of them."""
    if (export := _export_for(strategy, engine)) is not None:
        return export
    served = ", ".join(name for name in available_strategies() if _export_for(name, engine))
    raise UserError(f"{engine.title} does not serve {strategy} drafts, only {served}")


def _export_for(strategy: str, engine: Engine) -> DraftExport | None:
    export = resolve_strategy(strategy).export
    return export if export is not None and engine.name in export.served_as else None


def check_draft(draft: DraftDescription, engine: Engine) -> DraftExport:
    """The same, and raise UserError when the engine would not serve this draft as it was trained."""
    export = check_engine(draft.strategy, engine)
    if engine is SGLANG and draft.layer_ids[-1] == draft.num_target_layers - 1:
        raise UserError(
            f"SGLang does not capture the target's last layer ({draft.layer_ids[-1]}), which this draft reads: export "
            "for vllm, or train with other strategy.layer_ids"
        )
    export.check(draft, engine)
    return export


def serve_command(draft: DraftDescription, engine: Engine, folder: str) -> str:
    """The shell command that serves the target with the draft in `folder`."""
    if engine is SPECULATORS:
        return f"vllm serve {quote(folder)}"
    export, num_draft_tokens = check_engine(draft.strategy, engine), draft.num_draft_tokens
    name, options = export.served_as[engine.name], export.serve_options(draft, engine)
    if engine is SGLANG:
        options = {**options, "speculative-num-draft-tokens": num_draft_tokens + 1}
        lines = [
            f"python -m sglang.launch_server --model-path {quote(draft.target)} --dtype bfloat16",
            f"--speculative-algorithm {name} --speculative-draft-model-path {quote(folder)}",
            " ".join(f"--{option} {value}" for option, value in options.items()),
        ]
        return " \\\n  ".join(lines)
    speculative = {"method": name, "model": folder, "num_speculative_tokens": num_draft_tokens, **options}
    return f"vllm serve {quote(draft.target)} --speculative-config {quote(json.dumps(speculative))}"
