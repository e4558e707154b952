"""The model card: what the draft is, how to serve it, how it was trained, and what it was measured to accept."""

import json
from pathlib import PurePath

from lightning_dataflow.export.serve import serve_command
from lightning_dataflow.export.training import DECODING, TrainingRecord
from lightning_dataflow.strategies.published.contract import DraftDescription
from lightning_dataflow.strategies.published.engines import Engine
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.strategies.spec import StrategySpec


def model_card(
    engine: Engine, draft: DraftDescription, training: TrainingRecord | None, *, folder: str, assumed: bool
) -> str:
    """Markdown, with the front matter of model hubs. `assumed`: nothing says how many tokens are to be drafted."""
    target, spec = PurePath(draft.target).name, resolve_strategy(draft.strategy)
    paper = f" Algorithm: [{spec.paper}](https://arxiv.org/abs/{spec.paper})." if spec.paper else ""
    parts = [
        f"---\nbase_model: {json.dumps(target)}\ntags: [speculative-decoding, {spec.name}, {engine.name}]\n---",
        f"# {spec.title} draft of {target}",
        f"For speculative decoding with {engine.title}, written for {engine.tested} by lightning_dataflow.{paper} It "
        f"drafts up to {draft.num_draft_tokens} tokens at a time; the output stays the target's own.",
        f"## Serve\n\n```\n{serve_command(draft, engine, folder)}\n```",
        "## Network\n\n" + _table(_network(spec, draft)),
        *_training(spec, draft, training, assumed),
    ]
    return "\n\n".join(parts) + "\n"


def _network(spec: StrategySpec, draft: DraftDescription) -> dict[str, object]:
    assert spec.export is not None
    layers = {"target layers read (0 is the first)": ", ".join(map(str, draft.layer_ids))}
    return layers | spec.export.card_rows(draft.network) | {"weights": draft.dtype}


def _training(spec: StrategySpec, draft: DraftDescription, training: TrainingRecord | None, assumed: bool) -> list[str]:
    assert spec.export is not None
    if training is None:
        text = "## Training\n\nConverted from another folder, which does not say how it was trained"
        if assumed and spec.export.block_tokens(draft.network) is None:
            text += (
                f", nor how many tokens it is to draft at a time: {draft.num_draft_tokens} is lightning_dataflow's default"
            )
        return [f"{text}."]
    rows: dict[str, object] = {"optimizer steps": training.steps}
    if training.init_from is not None:
        rows["started from the draft"] = training.init_from
    if training.samples is not None:
        rows["samples"] = training.samples
    if training.global_batch_size is not None:
        rows["samples a step"] = training.global_batch_size
    if training.tokens is not None:
        rows["tokens"] = training.tokens
    if training.losses:
        rows["loss, first and last step"] = f"{training.losses[0]:.4g}, {training.losses[-1]:.4g}"
    rows |= {name: value for name, value in (("data", training.data), ("precision", training.precision)) if value}
    settings = {name: value for name, value in training.settings.items() if value is not None}
    parts = ["## Training\n\n" + _table(rows), "Settings:\n\n" + _table(settings)]
    if training.versions:
        parts.append("Trained with " + ", ".join(f"{name} {one}" for name, one in training.versions.items()) + ".")
    if not training.acceptance:
        return [*parts, "## Acceptance\n\nNot measured."]
    lines = [
        "| step | prompts | temperature | new tokens, at most | drafted at a time | acceptance length "
        "| accepted at least up to position 1, 2, … |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in training.acceptance:
        shares = [f"{share:.3f}" for share in one["acceptance_per_position"]]
        how = [one["step"], one["num_prompts"], *(one.get(name, "not recorded") for name in DECODING)]
        row = [*how, len(shares), f"{one['acceptance_length']:.3f}", ", ".join(shares)]
        lines.append(f"| {' | '.join(map(str, row))} |")
    note = "Mean tokens per verification on held-out prompts, by lightning_dataflow's own speculative decoding."
    return [*parts, f"## Acceptance\n\n{note}\n\n" + "\n".join(lines)]


def _table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
