"""The `evaluate` command: acceptance length of a checkpoint on held-out prompts."""

import json
from pathlib import Path
from typing import Any

from lightning_dataflow.app.command import command
from lightning_dataflow.app.schema import TrainConfig
from lightning_dataflow.contracts import UserError


def evaluate(config: TrainConfig, settings: dict[str, Any]) -> None:
    """Decode the held-out prompts speculatively, print a table, and write JSON if asked to."""
    from lightning_dataflow.app.build import Builder
    from lightning_dataflow.evaluation import evaluate_acceptance
    from lightning_dataflow.strategies.checkpoint import load_module

    options = config.evaluate
    parts = Builder(config, settings)
    if options.checkpoint is None:
        raise UserError("evaluate needs a draft: set evaluate.checkpoint to a checkpoint of a run")
    module = load_module(options.checkpoint, target=config.target.path)
    parts.layer_ids = module.layer_ids
    prompts = [prompt.question for prompt in parts.prompts[1]]
    if not prompts:
        raise UserError("no held-out prompts: set data.num_eval_samples")
    target = parts.evaluation_target()
    module.load_frozen_target(target.device)
    report = evaluate_acceptance(
        target,
        module.to(target.device).drafter(num_draft_tokens=options.num_draft_tokens),
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=config.seed,
        check_lossless=options.check_lossless,
        progress=lambda done, total: print(f"\rdecoded {done}/{total}", end="\n" * (done == total), flush=True),
    )
    result = report.to_json()
    for name, value in result.items():
        shown = ", ".join(f"{share:.3f}" for share in value) if name == "acceptance_per_position" else value
        print(f"{name:28}{shown:.3f}" if isinstance(shown, float) else f"{name:28}{shown}")
    if options.output is not None:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


main = command(evaluate)
