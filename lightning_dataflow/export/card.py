"""The model card: what the draft is, how to serve it, how it was trained, and what it was measured to accept."""

import json
from collections.abc import Sequence
from pathlib import PurePath

from lightning_dataflow.export.serve import check_engine, serve_command
from lightning_dataflow.export.training import table
from lightning_dataflow.strategies.published.contract import DraftDescription
from lightning_dataflow.strategies.published.engines import Engine
from lightning_dataflow.strategies.registry import resolve_strategy


def model_card(engine: Engine, draft: DraftDescription, training: Sequence[str], *, folder: str) -> str:
    """Markdown, with the front matter of model hubs. `training`: sections on how the draft was trained."""
    target, spec = PurePath(draft.target).name, resolve_strategy(draft.strategy)
    layers = {"target layers read (0 is the first)": ", ".join(map(str, draft.layer_ids))}
    sizes = check_engine(draft.strategy, engine).card_rows(draft.network)
    paper = f" Algorithm: [{spec.paper}](https://arxiv.org/abs/{spec.paper})." if spec.paper else ""
    parts = [
        f"---\nbase_model: {json.dumps(target)}\ntags: [speculative-decoding, {spec.name}, {engine.name}]\n---",
        f"# {spec.title} draft of {target}",
        f"For speculative decoding with {engine.title}, written for {engine.tested} by lightning_dataflow.{paper} It "
        f"drafts up to {draft.num_draft_tokens} tokens at a time; the output stays the target's own.",
        f"## Serve\n\n```\n{serve_command(draft, engine, folder)}\n```",
        "## Network\n\n" + table(layers | sizes | {"weights": draft.dtype}),
        *training,
    ]
    return "\n\n".join(parts) + "\n"


def conversion_section(draft: DraftDescription, *, assumed: bool) -> str:
    """On training, of a draft from another folder. `assumed`: that folder does not say how many tokens to draft."""
    text = "## Training\n\nConverted from another folder, which does not say how it was trained"
    if assumed and not hasattr(draft.network, "block_size"):  # a block says how many it drafts
        text += f", nor how many tokens it is to draft at a time: {draft.num_draft_tokens} is lightning_dataflow's default"
    return f"{text}."
